"""Frozen records that cross process borders, and the error tree.

Everything here is picklable and free of torch, ray, megatron and sglang, so any process may import it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from dapo_megatron.arrays import (
    FLOAT32,
    INT32,
    ExpertTable,
    Float32Array,
    Int32Array,
    expert_table,
    records_equal,
    set_column,
    smallest,
)

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


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One finished response of T tokens; the arrays are [T] and read-only.

    `log_probs[t]` (nats) is the engine's log-probability of `token_ids[t]` under the distribution it sampled from;
    `weight_versions[t]` the actor weights that produced the token. T includes the stop token when `finish_reason == "stop"`.
    Any sequences are taken and kept as arrays; ValueError when their lengths differ.
    """

    token_ids: Int32Array
    log_probs: Float32Array
    weight_versions: Int32Array
    finish_reason: FinishReason
    text: str
    routed_experts: ExpertTable | None = None
    """[prompt + T - 1, layers, top_k]: the experts that each token went to, all but the last one, which went nowhere; uint8 or uint16,
    0 in layers without experts. An unfinished sample may have fewer rows. None: not asked for (rollout.engine.return_routed_experts)."""

    def __post_init__(self) -> None:
        for name, column in (("token_ids", INT32), ("log_probs", FLOAT32), ("weight_versions", INT32)):
            set_column(self, name, column)
        if self.routed_experts is not None:
            object.__setattr__(self, "routed_experts", expert_table(self.routed_experts))
        lengths = len(self.token_ids), len(self.log_probs), len(self.weight_versions)
        if len(set(lengths)) > 1:
            raise ValueError(f"token_ids, log_probs and weight_versions have lengths {lengths}; give one of each per token")

    def __eq__(self, other: object) -> bool:
        return records_equal(self, other)


@dataclass(frozen=True, slots=True)
class Score:
    """Verdict of a reward function on one sample: `reward` is what is optimised, `correct` what dynamic sampling looks at."""

    reward: float
    correct: bool
    error: str | None = None
    """Why the verdict is a default one (time-out, worker killed, exception); None when the function answered."""
    answer: str | None = field(default=None, compare=False)
    """What the response states, in the form in which maj@k counts votes; None when it states nothing. No part of the verdict."""

    def __reduce__(self) -> tuple[type[Score], tuple[float, bool, str | None, str | None]]:
        """As a call: verdicts come from another process in thousands, and dataclasses with slots are slow to unpickle."""
        return type(self), (self.reward, self.correct, self.error, self.answer)


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
        return smallest([sample.weight_versions for sample in self.samples])


@dataclass(frozen=True, slots=True, eq=False)
class TrainSample:
    """One sequence (prompt, then response) as the actor trains on it; `rollout_log_probs` (nats) has one entry per response token.

    `loss_weight` scales every token of the sample so that sum(weight * token loss) / (trained tokens of the optimizer step)
    is the configured aggregation: 1 for `token_mean`.
    """

    token_ids: Int32Array
    num_prompt_tokens: int
    rollout_log_probs: Float32Array
    advantage: float
    loss_weight: float
    on_policy: bool = True
    """Every token was sampled by the weights about to be trained; False for a surplus group of an earlier rollout step."""

    def __post_init__(self) -> None:
        set_column(self, "token_ids", INT32)
        set_column(self, "rollout_log_probs", FLOAT32)
        if len(self.rollout_log_probs) != self.num_loss_tokens:
            raise ValueError(
                f"rollout_log_probs has {len(self.rollout_log_probs)} entries for {self.num_loss_tokens} response tokens; "
                "give one per response token"
            )

    def __eq__(self, other: object) -> bool:
        return records_equal(self, other)

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

    def share(self, dp_rank: int) -> OptimizerStepBatch:
        """The step with nothing but the micro-batches of one data-parallel rank; the other ranks' places are empty."""
        places = enumerate(self.micro_batches)
        return replace(self, micro_batches=tuple(of_rank if rank == dp_rank else () for rank, of_rank in places))


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """All optimizer steps of one rollout step, in order."""

    optimizer_steps: tuple[OptimizerStepBatch, ...]

    def share(self, dp_rank: int) -> TrainBatch:
        """What one data-parallel rank needs of the batch, see `OptimizerStepBatch.share`."""
        return TrainBatch(tuple(step.share(dp_rank) for step in self.optimizer_steps))


@dataclass(frozen=True, slots=True)
class EngineEndpoint:
    """Where a rollout server listens; requests carry the header `Authorization: Bearer API_KEY` when there is a key."""

    name: str
    """As users know it: `engine 0`."""
    url: str
    """`http://host:port`, without a slash at the end."""
    tensor_parallel_size: int
    device: Literal["cpu", "cuda"]
    node: str = "127.0.0.1"
    """Address of the machine."""
    api_key: str | None = field(default=None, repr=False)
    log_file: Path | None = None
    """Its output; None for a server that the run did not start."""
    gpu_ids: tuple[int, ...] = ()
    """GPUs of the machine that it sees; empty where that is not known."""
    life: int = 0
    """How often it was lost and has come back under the same URL: nothing of its earlier lives is there any more."""


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


class SchedulerError(DapoMegatronError):
    """Slurm refused, or does not answer."""


class MappingError(DapoMegatronError):
    """A weight mapping does not tile: an element is missing, covered twice, or has the wrong shape."""


class FingerprintError(DapoMegatronError):
    """An engine does not hold the weights that the actor sent."""


class CheckpointError(DapoMegatronError):
    """A checkpoint is missing, incomplete or belongs to another run."""


class EngineError(DapoMegatronError):
    """A rollout engine failed or did not answer in time."""


class EngineLostError(EngineError):
    """A rollout server is gone or does not answer: its requests can be sent to another one. `endpoint` is its name."""

    def __init__(self, message: str, endpoint: str):
        self.endpoint = endpoint
        super().__init__(message)

    def __reduce__(self) -> tuple[type[EngineLostError], tuple[str, str]]:
        return type(self), (str(self), self.endpoint)


class VersionGoneError(EngineError):
    """The actor does not hold the weight version that was asked for: it trains, or has trained since."""


class SignalError(DapoMegatronError):
    """Too few groups carry a learning signal, and the config asks to stop then."""


class NumericsError(DapoMegatronError):
    """A loss or gradient is not finite; the weights of this process must not be used any more."""


class LogProbError(DapoMegatronError):
    """Actor and engine give the same tokens different log-probabilities, and the config asks to stop then."""


class WorkerDiedError(DapoMegatronError):
    """A process of the run ended; the message names it and quotes its last log lines."""


class StalledError(DapoMegatronError):
    """A phase made no progress within its deadline; the message says where its processes stood."""


class StopNotSavedError(DapoMegatronError):
    """The run was told to stop and could not save what it had done since the last checkpoint."""


class BadNodeError(DapoMegatronError):
    """A node of the job cannot run it, or did not come."""
