"""Random training batches for the layout tests, cut in different ways."""

from __future__ import annotations

import numpy as np

from dapo_megatron.types import OptimizerStepBatch, TrainBatch, TrainSample

VOCAB_SIZE = 101


def random_samples(count: int = 8, seed: int = 0) -> list[TrainSample]:
    """Samples of 3 to 9 prompt and 1 to 11 response tokens, with unequal advantages and loss weights; often two of one prompt."""
    rng = np.random.default_rng(seed)
    samples = []
    for index in range(count):
        num_response = int(rng.integers(1, 12))
        if index % 3 != 1:
            prompt = rng.integers(0, VOCAB_SIZE, int(rng.integers(3, 10)))
        samples.append(
            TrainSample(
                token_ids=(*prompt.tolist(), *rng.integers(0, VOCAB_SIZE, num_response).tolist()),
                num_prompt_tokens=len(prompt),
                rollout_log_probs=tuple((-rng.random(num_response)).tolist()),
                advantage=float(rng.normal()),
                loss_weight=float(0.5 + rng.random()),
            )
        )
    return samples


def cut(samples: list[TrainSample], *, num_ranks: int, samples_per_micro_batch: int, num_updates: int = 1) -> TrainBatch:
    """Optimizer steps of equally many samples, which are dealt to data-parallel ranks in equal runs."""
    per_step = len(samples) // num_updates
    steps = [samples[start : start + per_step] for start in range(0, len(samples), per_step)]
    return TrainBatch(tuple(_cut_step(step, num_ranks, samples_per_micro_batch) for step in steps))


def _cut_step(samples: list[TrainSample], num_ranks: int, samples_per_micro_batch: int) -> OptimizerStepBatch:
    per_rank = len(samples) // num_ranks
    shares = [samples[rank * per_rank : (rank + 1) * per_rank] for rank in range(num_ranks)]
    micro_batches = tuple(
        tuple(tuple(share[i : i + samples_per_micro_batch]) for i in range(0, per_rank, samples_per_micro_batch))
        for share in shares
    )
    return OptimizerStepBatch(micro_batches, sum(sample.num_loss_tokens for sample in samples))
