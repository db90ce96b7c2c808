"""Batches to time a layout with: full micro-batches of random tokens, in the lengths of a workload."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dapo_megatron.types import MicroBatch, OptimizerStepBatch, TrainBatch, TrainSample


@dataclass(frozen=True, slots=True)
class ProbeLengths:
    """Prompt and response lengths to draw from, in tokens; the responses to a prompt come in groups."""

    prompts: Sequence[int]
    responses: Sequence[int]
    num_samples_per_prompt: int


def probe_batch(
    lengths: ProbeLengths,
    num_micro_batches: Sequence[int],
    *,
    num_copies: int,
    max_tokens: int,
    vocab_size: int,
    seed: int,
) -> TrainBatch:
    """One optimizer step per entry of `num_micro_batches`, of so many on each of `num_copies` data-parallel ranks.

    Every micro-batch has exactly `max_tokens` tokens, which is what packing approaches: its last response is cut to fit.
    """
    rng = np.random.default_rng(seed)
    micro_batches = _micro_batches(rng, lengths, max_tokens, vocab_size)
    steps = []
    for number in num_micro_batches:
        ranks = tuple(tuple(next(micro_batches) for _ in range(number)) for _ in range(num_copies))
        num_tokens = sum(sample.num_loss_tokens for rank in ranks for micro_batch in rank for sample in micro_batch)
        steps.append(OptimizerStepBatch(ranks, num_tokens))
    return TrainBatch(tuple(steps))


def _micro_batches(rng: np.random.Generator, lengths: ProbeLengths, max_tokens: int, vocab_size: int) -> Iterator[MicroBatch]:
    while True:
        samples: list[TrainSample] = []
        left, prompt = max_tokens, np.zeros(0, np.int32)
        while left >= 2:  # a prompt token and one to train on
            if len(samples) % lengths.num_samples_per_prompt == 0:
                prompt = rng.integers(0, vocab_size, int(rng.choice(lengths.prompts)), dtype=np.int32)
            prompt = prompt[: left - 1]
            num_response = min(int(rng.choice(lengths.responses)), left - len(prompt))
            left -= len(prompt) + num_response
            num_response += left if left < 2 else 0
            samples.append(_sample(rng, prompt, num_response, vocab_size))
        yield tuple(samples)


def _sample(rng: np.random.Generator, prompt: np.ndarray, num_response: int, vocab_size: int) -> TrainSample:
    response = rng.integers(0, vocab_size, num_response, dtype=np.int32)
    return TrainSample(
        token_ids=np.concatenate((prompt, response)),
        num_prompt_tokens=len(prompt),
        rollout_log_probs=np.full(num_response, -math.log(vocab_size), np.float32),
        advantage=float(rng.normal()),
        loss_weight=1.0,
        on_policy=True,
    )
