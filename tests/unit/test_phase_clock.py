"""Deadlines of phases: configured, learnt, and what happens past them."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from dapo_megatron.config.schema import ClusterConfig, Config
from dapo_megatron.exit_codes import ExitCode
from dapo_megatron.launcher.phase_clock import Deadlines, PhaseClock
from dapo_megatron.launcher.phase_history import NUM_TO_LEARN, PhaseHistory, PhaseTimes, settings_of
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
        learnt.history.add("train", seconds)
    learnt.history.add("save", 1.0)
    assert (learnt.of("train"), learnt.of("save")) == (3000, 3600)
    assert learnt.in_words("train").startswith("learnt: 10 times the longest so far, 300.0 s")
    for _ in range(2):
        learnt.history.add("save", 1.0)
    assert learnt.of("save") == 600
    assert deadlines(7).of("train") == 7


def test_what_one_attempt_learns_the_next_one_knows(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    file = tmp_path / "times.json"
    first = PhaseHistory(file, "settings")
    for seconds in (100.0, 300.0):
        first.add("train", seconds)
    second = PhaseHistory(file, "settings")
    assert second.of("train") is None
    second.add("train", 200.0)
    assert PhaseHistory(file, "settings").of("train") == PhaseTimes(3, 300.0)
    assert PhaseHistory(file, "other settings").of("train") is None
    file.write_bytes(file.read_bytes()[:-5])
    assert PhaseHistory(file, "settings").of("train") is None and f"{file} is damaged" in caplog.text


def test_times_of_other_sizes_are_not_used_and_those_of_another_attempt_are():
    def settings(**changes: object) -> str:
        return settings_of(Config.model_validate({"model": {"path": "m"}, "data": {"path": "d"}, **changes}))

    assert settings() == settings(cluster={"ray_address": "10.0.0.1:6379"}) == settings(run={"dir": "elsewhere"})
    assert settings() != settings(actor={"num_ranks": 2}) != settings(slurm={"nodes": 2})


def test_a_history_that_cannot_be_written_costs_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    history = PhaseHistory(tmp_path / "absent" / "times.json")
    for _ in range(NUM_TO_LEARN):
        history.add("train", 1.0)
    assert history.of("train") == PhaseTimes(3, 1.0) and "cannot be written" in caplog.text


async def test_a_phase_that_says_nothing_about_the_next_is_not_learnt_from():
    clock = PhaseClock(learnt := deadlines(None))
    for _ in range(NUM_TO_LEARN):
        await clock.run("save", asyncio.sleep(0), learns=False)
    assert learnt.history.of("save") is None
    for seconds in (40.0, 90.0, 70.0):
        clock.learn("save", seconds)
    assert learnt.of("save") == 900


_BLOCKED = """
import asyncio, sys, time
from dapo_megatron.config.schema import ClusterConfig
from dapo_megatron.launcher.phase_clock import Deadlines, PhaseClock

clock = PhaseClock(Deadlines(ClusterConfig(phase_deadline_seconds=0.1)), diagnose=lambda words: "rank 3 is stopped")

async def blocks():
    time.sleep(float(sys.argv[1]))

async def run():
    with clock.last_resort(poll_seconds=0.05, wait_seconds=0.1):
        await clock.run("save", blocks())
        print("saved")

asyncio.run(run())
"""


def test_a_controller_that_stands_still_is_ended_with_its_diagnosis():
    ended = subprocess.run([sys.executable, "-c", _BLOCKED, "60"], capture_output=True, text=True, timeout=50, check=False)
    assert ended.returncode == ExitCode.STALLED
    assert ended.stdout.startswith(
        "error: phase save did not end within 0.1 s (cluster.phase_deadline_seconds), and the controller"
    )
    assert ended.stdout.endswith("stands still. rank 3 is stopped\n")


def test_a_controller_that_is_in_time_is_left_alone():
    ended = subprocess.run([sys.executable, "-c", _BLOCKED, "0"], capture_output=True, text=True, timeout=50, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "saved\n", "")
