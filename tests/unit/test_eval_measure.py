"""Measuring over fakes of engine and scorer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from dapo_megatron.eval.measure import Protocol, held_out_metrics, measure
from dapo_megatron.eval.records import ProblemRecord
from dapo_megatron.rollout.engine import GenerateResult, SamplingParams
from dapo_megatron.types import EngineError, Prompt, Sample, Score

PROMPTS = {number: Prompt(number + 10, (5,), f"problem {number}", "1") for number in range(4)}
PROTOCOL = Protocol(2, SamplingParams(), seed=1)


class FakeEngine:
    """Sample i says i; `hangs_at` is a problem it never answers, `answers_with` the version its tokens carry."""

    weight_version = 6

    def __init__(self, *, hangs_at: int | None = None, answers_with: int = 6):
        self.hangs_at, self.answers_with = hangs_at, answers_with

    async def generate(self, requests: Any) -> AsyncIterator[GenerateResult]:
        for request in requests:
            await asyncio.sleep(3600 if request.request_id == self.hangs_at else 0)
            samples = tuple(Sample((1,), (-0.5,), (self.answers_with,), "stop", str(i)) for i in range(request.num_samples))
            yield GenerateResult(request.request_id, samples)


class FakeScorer:
    async def score(self, responses: Sequence[str], answer: str) -> tuple[Score, ...]:
        return tuple(Score(float(text == answer), text == answer, answer=text) for text in responses)


async def records_of(engine: FakeEngine) -> list[ProblemRecord]:
    records: list[ProblemRecord] = []
    await measure([engine], FakeScorer(), PROMPTS, PROTOCOL, records.append)
    return records


async def test_every_problem_is_taken_once_with_its_responses():
    records = await records_of(FakeEngine())
    assert sorted((record.problem, record.row, record.num_correct, record.weight_version) for record in records) == [
        (number, number + 10, 1, 6) for number in range(4)
    ]


async def test_an_engine_that_stalls_is_an_error_after_the_problems_before_it_were_taken():
    taken: list[ProblemRecord] = []
    with pytest.raises(EngineError, match=r"no problem was finished within cluster.phase_deadline_seconds \(1.5\)"):
        await measure([FakeEngine(hangs_at=2)], FakeScorer(), PROMPTS, PROTOCOL, taken.append, stall_seconds=1.5)
    assert [record.problem for record in taken] == [0, 1]


async def test_an_engine_without_the_weights_it_reports_is_an_error():
    with pytest.raises(EngineError, match="weights of version 5, not 6"):
        await records_of(FakeEngine(answers_with=5))


async def test_an_error_of_the_taker_is_raised_as_it_is():
    def full(record: ProblemRecord) -> None:
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        await measure([FakeEngine()], FakeScorer(), PROMPTS, PROTOCOL, full, stall_seconds=5)


async def test_metrics_of_a_run_leave_out_what_one_sample_cannot_show():
    protocol = Protocol(1, SamplingParams(), seed=1)
    metrics = await held_out_metrics([FakeEngine()], FakeScorer(), [Prompt(0, (5,), "?", "0")], protocol)
    assert metrics == {
        "eval/accuracy": 1.0,
        "eval/solved_fraction": 1.0,
        "eval/majority_accuracy": 1.0,
        "eval/response_length_tokens": 1.0,
        "eval/truncated_fraction": 0.0,
        "eval/num_tokens_generated": 1,
        "eval/num_tokens_redrawn": 0,
    }
