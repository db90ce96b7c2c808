"""Frozen records that cross process borders, and the error tree.

Everything here is picklable and free of torch, ray, megatron and sglang, so any process may import it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "abort"]
LossAggregation = Literal["token_mean", "prompt_mean", "sample_mean"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One problem of the data set, tokenised.

    `index` is the row in the data source (0-based), stable over epochs; `answer` is the ground truth as text.
    """

    index: int
    token_ids: tuple[int, ...]
    text: str
    answer: str


@dataclass(frozen=True, slots=True)
class Sample:
    """One finished response.

    `log_probs[t]` (nats) is the engine's log-probability of `token_ids[t]` under the distribution it sampled from;
    `weight_versions[t]` the actor weights that produced the token. Both have the length of `token_ids`, which includes the
    stop token when `finish_reason == "stop"`.
    """

    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    weight_versions: tuple[int, ...]
    finish_reason: FinishReason
    text: str


@dataclass(frozen=True, slots=True)
class Score:
    """Verdict of a reward function on one sample: `reward` is what is optimised, `correct` what dynamic sampling looks at."""

    reward: float
    correct: bool
    error: str | None = None
    """Why the verdict is a default one (time-out, worker killed, exception); None when the function answered."""
    answer: str | None = field(default=None, compare=False)
    """What the response states, in the form in which maj@k counts votes; None when it states nothing. No part of the verdict."""


@dataclass(frozen=True, slots=True)
class RolloutGroup:
    """G scored samples of one prompt. `group_id` is unique within a run and grows in the order of submission."""

    group_id: int
    prompt: Prompt
    samples: tuple[Sample, ...]
    scores: tuple[Score, ...]

    @property
    def accuracy(self) -> float:
        """Share of correct samples, in [0, 1]."""
        return sum(score.correct for score in self.scores) / len(self.scores)

    @property
    def num_tokens(self) -> int:
        """Response tokens over all samples of the group."""
        return sum(len(sample.token_ids) for sample in self.samples)

    @property
    def oldest_weight_version(self) -> int:
        """The oldest weights that produced any token of the group."""
        return min(min(sample.weight_versions) for sample in self.samples if sample.weight_versions)


@dataclass(frozen=True, slots=True)
class TrainSample:
    """One sequence (prompt, then response) as the actor trains on it.

    `loss_weight` scales every token of the sample so that sum(weight * token loss) / (trained tokens of the optimizer step)
    is the configured aggregation: 1 for `token_mean`.
    """

    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    rollout_log_probs: tuple[float, ...]
    advantage: float
    loss_weight: float
    on_policy: bool = True
    """Every token was sampled by the weights about to be trained; False for a surplus group of an earlier rollout step."""

    @property
    def num_loss_tokens(self) -> int:
        """Trained tokens: every response token."""
        return len(self.token_ids) - self.num_prompt_tokens


MicroBatch = tuple[TrainSample, ...]


@dataclass(frozen=True, slots=True)
class OptimizerStepBatch:
    """Samples of one optimizer step: `micro_batches[dp_rank][i]`; every data-parallel rank has the same number of them.

    A micro-batch may be empty on a rank that has nothing left to do.
    """

    micro_batches: tuple[tuple[MicroBatch, ...], ...]
    num_loss_tokens: int
    """Trained tokens over all ranks and micro-batches: the normaliser."""


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """All optimizer steps of one rollout step, in order."""

    optimizer_steps: tuple[OptimizerStepBatch, ...]


class DapoMegatronError(Exception):
    """Root of every error this library raises on purpose. The message says value, rule and remedy."""


class ConfigError(DapoMegatronError):
    """The configuration cannot work. `problems` holds one sentence per fault."""

    def __init__(self, problems: list[str] | str):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[type[ConfigError], tuple[list[str]]]:
        return type(self), (self.problems,)


class DataError(DapoMegatronError):
    """The data source cannot be used as configured."""


class RewardError(DapoMegatronError):
    """The reward function cannot be loaded or its workers cannot be started."""


class MappingError(DapoMegatronError):
    """A weight mapping does not tile: an element is missing, covered twice, or has the wrong shape."""


class FingerprintError(DapoMegatronError):
    """An engine does not hold the weights that the actor sent."""


class CheckpointError(DapoMegatronError):
    """A checkpoint is missing, incomplete or belongs to another run."""


class EngineError(DapoMegatronError):
    """A rollout engine failed or did not answer in time."""


class NumericsError(DapoMegatronError):
    """A loss or gradient is not finite; the weights of this process must not be used any more."""


class WorkerDiedError(DapoMegatronError):
    """A process of the run ended; the message names it and quotes its last log lines."""
