"""What is kept of each evaluated problem: one line of problems.jsonl."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np

from dapo_megatron.types import EngineError, FinishReason, RolloutGroup


@dataclass(frozen=True, slots=True)
class ResponseRecord:
    """One response and its verdict. `stated_answer` is its vote in maj@k; `error` is set where the verdict is a default one."""

    text: str
    correct: bool
    reward: float
    stated_answer: str | None
    num_tokens: int
    finish_reason: FinishReason
    error: str | None


@dataclass(frozen=True, slots=True)
class ProblemRecord:
    """One problem with all its responses. `problem` numbers the problems of an evaluation from 0, `row` is the row in the data."""

    problem: int
    row: int
    weight_version: int
    prompt: str
    answer: str
    num_correct: int
    responses: tuple[ResponseRecord, ...]

    @classmethod
    def of(cls, group: RolloutGroup, weight_version: int) -> Self:
        """From a scored group whose id is the number of the problem.

        Raises EngineError when a token comes from other weights than `weight_version`.
        """
        versions = {version for sample in group.samples for version in np.unique(sample.weight_versions).tolist()} - {
            weight_version
        }
        if versions:
            raise EngineError(
                f"problem {group.group_id} was answered by weights of version {versions.pop()}, not {weight_version}; "
                "an engine did not take the weights it was sent, look at its log"
            )
        responses = tuple(
            ResponseRecord(
                text=sample.text,
                correct=score.correct,
                reward=score.reward,
                stated_answer=score.answer,
                num_tokens=len(sample.token_ids),
                finish_reason=sample.finish_reason,
                error=score.error,
            )
            for sample, score in zip(group.samples, group.scores, strict=True)
        )
        return cls(
            problem=group.group_id,
            row=group.prompt.index,
            weight_version=weight_version,
            prompt=group.prompt.text,
            answer=group.prompt.answer,
            num_correct=sum(response.correct for response in responses),
            responses=responses,
        )

    def to_json(self) -> str:
        """One line, without its end; any text survives, lone surrogates too."""
        return json.dumps(asdict(self), allow_nan=False)

    @classmethod
    def from_json(cls, line: str | bytes) -> Self:
        """What `to_json` wrote. Raises ValueError, KeyError or TypeError for anything else."""
        record: dict[str, Any] = json.loads(line)
        return cls(**{**record, "responses": tuple(ResponseRecord(**response) for response in record["responses"])})
