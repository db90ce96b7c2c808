"""How many forward passes a pipeline rank holds at once, by model chunk (megatron-core's 1F1B schedules)."""

from __future__ import annotations

from functools import lru_cache


@lru_cache(maxsize=4096)
def passes_in_flight(stage: int, num_stages: int, num_chunks: int, num_micro_batches: int) -> tuple[int, ...]:
    """Per chunk of one stage, at the fullest moment.

    Without interleaving stage r holds num_stages - r micro-batches. With it a rank passes groups of num_stages micro-batches through
    one chunk after the other, and has 2 (num_stages - r - 1) + (num_chunks - 1) num_stages + 1 passes behind it at the first backward.
    """
    if num_chunks == 1:
        return (min(num_micro_batches, num_stages - stage),)
    total = min(num_micro_batches * num_chunks, 2 * (num_stages - stage - 1) + (num_chunks - 1) * num_stages + 1)
    counts = [0] * num_chunks
    for group_start in range(0, num_micro_batches, num_stages):
        group = min(num_stages, num_micro_batches - group_start)
        for chunk in range(num_chunks):
            taken = min(group, total)
            counts[chunk] += taken
            total -= taken
    return tuple(counts)
