"""What one rollout step asks for: prompts, samples and how long the responses are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import NDArray

NUM_QUANTILES = 256
"""Points by which a length distribution is represented."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Sizes of a rollout step, in the words of the configuration, and the lengths to expect.

    Response lengths are log-normal and cut at `max_response_tokens`: most answers are short, a few run into the limit.
    """

    num_prompts_per_step: int = 512
    num_samples_per_prompt: int = 16
    num_updates_per_rollout: int = 16
    max_prompt_tokens: int = 1024
    max_response_tokens: int = 20480
    mean_prompt_tokens: float | None = None
    """None: a quarter of `max_prompt_tokens`."""
    mean_response_tokens: float | None = None
    """None: a third of `max_response_tokens`."""
    length_spread: float = 0.8
    """Standard deviation of the logarithm of response lengths."""
    over_sampling: float = 1.5
    """Groups generated per group trained on: dynamic sampling drops the others."""
    num_rollout_steps: int = 100
    has_old_log_probs_pass: bool = True
    """A forward pass of the actor for the old log-probabilities (`algo.old_log_probs actor`)."""
    sampler: Literal["waves", "streaming"] = "waves"
    """As in `rollout.sampler`: engines run dry once a wave, or once a step."""
    rollout_lag: int = 0
    """1: engines generate for the next step while this one trains."""

    @property
    def max_sequence_tokens(self) -> int:
        """The longest sequence a micro-batch must hold."""
        return self.max_prompt_tokens + self.max_response_tokens

    @property
    def prompt_tokens(self) -> float:
        """Mean length of a prompt."""
        return self.max_prompt_tokens / 4 if self.mean_prompt_tokens is None else self.mean_prompt_tokens

    @property
    def response_tokens(self) -> float:
        """Mean length of a response."""
        return self.max_response_tokens / 3 if self.mean_response_tokens is None else self.mean_response_tokens

    @property
    def num_samples_per_step(self) -> int:
        """Sequences trained on in a rollout step."""
        return self.num_prompts_per_step * self.num_samples_per_prompt

    @property
    def num_samples_per_update(self) -> float:
        """Sequences of one optimizer step."""
        return self.num_samples_per_step / self.num_updates_per_rollout

    def response_lengths(self) -> NDArray[np.float64]:
        """Response lengths in tokens, ascending, [NUM_QUANTILES]: equally likely values whose mean is `response_tokens`."""
        return _lengths(self.response_tokens, self.max_response_tokens, self.length_spread)

    @property
    def sequence_tokens(self) -> float:
        """Mean length of prompt and response together."""
        return self.prompt_tokens + self.response_tokens

    def longest_of(self, num_sequences: float) -> float:
        """The longest sequence to expect among so many, in tokens; of one its median."""
        lengths = self.response_lengths()
        return float(lengths[int(num_sequences / (num_sequences + 1) * len(lengths))]) + self.prompt_tokens

    @property
    def mean_square(self) -> float:
        """Sum of squared lengths of sequences over the sum of their lengths, in tokens."""
        return _mean_square(self.response_tokens, self.max_response_tokens, self.length_spread, self.prompt_tokens)


@lru_cache(maxsize=64)
def _lengths(mean: float, maximum: int, spread: float) -> NDArray[np.float64]:
    normal = NormalDist()
    points = np.array([normal.inv_cdf((i + 0.5) / NUM_QUANTILES) for i in range(NUM_QUANTILES)])
    shape = np.exp(spread * points)
    low, high = -40.0, 40.0
    for _ in range(80):
        middle = (low + high) / 2
        lengths = np.clip(shape * math.exp(middle), 1, maximum)
        low, high = (middle, high) if lengths.mean() < mean else (low, middle)
    lengths.flags.writeable = False
    return lengths


@lru_cache(maxsize=64)
def _mean_square(mean: float, maximum: int, spread: float, prompt_tokens: float) -> float:
    lengths = _lengths(mean, maximum, spread) + prompt_tokens
    return float((lengths**2).sum() / lengths.sum())
