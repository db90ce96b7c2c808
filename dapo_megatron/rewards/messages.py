"""What the trainer and its verifier processes send each other; the protocol is in `worker_process.py`."""

from __future__ import annotations

from dataclasses import dataclass

from dapo_megatron.types import Score


@dataclass(frozen=True, slots=True)
class WorkerSetup:
    """What a worker needs of RewardConfig, free of pydantic: that import would triple the start-up time."""

    type: str
    function: str | None
    correct_reward: float
    wrong_reward: float
    memory_limit_mib: int


@dataclass(frozen=True, slots=True)
class StartScorer:
    """Fork a scorer."""


@dataclass(frozen=True, slots=True)
class EndScorer:
    """Kill and collect a scorer."""

    pid: int


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """Responses to one problem."""

    responses: tuple[str, ...]
    answer: str


@dataclass(frozen=True, slots=True)
class ScorerReply:
    """The next verdicts of a request, in order. A scorer that is `spent` (out of memory) must be replaced then: it would fail the next
    response too."""

    scores: tuple[Score, ...]
    spent: bool
