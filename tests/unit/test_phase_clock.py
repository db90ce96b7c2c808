"""Deadlines of phases: configured, learnt, and what happens past them."""

from __future__ import annotations

import asyncio

import pytest

from dapo_megatron.config.schema import ClusterConfig
from dapo_megatron.launcher.phase_clock import Deadlines, PhaseClock
from dapo_megatron.types import StalledError


def deadlines(seconds: float | None) -> Deadlines:
    return Deadlines(ClusterConfig(phase_deadline_seconds=seconds))


async def test_a_phase_over_its_deadline_is_named_with_its_diagnosis_before_it_is_given_up():
    state = []

    async def stuck() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            state.append("given up")

    def diagnose(words: str) -> str:
        state.append("diagnosed")
        return "rank 3 is stopped"

    clock = PhaseClock(deadlines(0.05), diagnose=diagnose)
    with pytest.raises(StalledError, match=r"phase train did not end within 0.05 s \(cluster.phase.*\)\. rank 3 is stopped"):
        await clock.run("train", stuck())
    assert state == ["diagnosed", "given up"]


async def test_an_error_or_a_result_in_time_comes_through():
    clock = PhaseClock(deadlines(5))
    assert await clock.run("sync", asyncio.sleep(0, "done")) == "done"
    with pytest.raises(ZeroDivisionError):
        await clock.run("sync", asyncio.to_thread(lambda: 1 // 0))
    assert set(clock.seconds()) == {"sync", "step"}


async def test_a_cancelled_wait_gives_up_its_phase():
    ended = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    waiting = asyncio.create_task(PhaseClock(deadlines(5)).run("rollout", work()))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert ended.is_set()


def test_a_deadline_is_learnt_from_the_longest_of_its_own_phase_and_never_short():
    learnt = deadlines(None)
    assert learnt.of("train") == 3600 and "without a history" in learnt.in_words("train")
    for seconds in (100.0, 300.0, 200.0):
        learnt.learn("train", seconds)
    learnt.learn("save", 1.0)
    assert (learnt.of("train"), learnt.of("save")) == (3000, 3600)
    for _ in range(2):
        learnt.learn("save", 1.0)
    assert learnt.of("save") == 600
    assert deadlines(7).of("train") == 7
