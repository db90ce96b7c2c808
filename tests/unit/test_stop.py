"""Being told to stop: what a signal becomes, and what the loop drops, finishes and saves."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from dapo_megatron.exit_codes import MEANINGS, ExitCode, code_of
from dapo_megatron.launcher.controller import read_state
from dapo_megatron.launcher.stop import stop_on_signals
from dapo_megatron.types import CheckpointError, ConfigError, StalledError, StopNotSavedError, TrainBatch, WorkerDiedError
from tests.unit.test_controller import make


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
async def test_a_signal_is_heard_by_the_listener_and_by_no_child(number: signal.Signals):
    with stop_on_signals() as stop, stop.listening() as heard:
        child = subprocess.Popen(  # noqa: ASYNC220 - nobody else waits in this loop
            [sys.executable, "-c", "print(1, flush=True); input()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert child.stdout is not None and child.stdout.readline()
        child.send_signal(number)
        os.kill(os.getpid(), number)
        await asyncio.wait_for(heard.wait(), 10)
        assert stop.reason == number.name
        child.communicate(b"\n", timeout=10)
        assert child.returncode == 0
    assert number not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_without_a_listener_a_signal_interrupts():
    with pytest.raises(KeyboardInterrupt), stop_on_signals() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        while True:  # it comes between two steps of Python, not into a long one
            time.sleep(0.01)
    assert stop.reason == "SIGUSR1"


def stopping(controller: Any) -> Any:
    """Tells the controller to stop, from within one of its phases."""
    controller._stop.request("SIGUSR1")


async def test_a_rollout_under_way_is_dropped_and_comes_again(tmp_path: Path):
    controller, actor, engine, rows, folder = make(tmp_path / "run", right={"0"}, num_rollout_steps=3)
    generate = engine.generate

    async def generate_then_hang(requests: Any) -> AsyncIterator[Any]:
        async for result in generate(requests):
            yield result
        if engine.weight_version == 1:
            stopping(controller)
            await asyncio.sleep(60)

    engine.generate = generate_then_hang
    assert not await controller.run()
    assert [row["rollout_step"] for row in rows] == [1] and actor.calls[-1] == ("save", "step_000001.tmp")
    state = read_state(folder.checkpoints / "step_000001")
    assert (state.num_steps, state.sampler.next_group_id, state.prompts.position) == (1, 2, 2), "as before the dropped rollout"


async def test_a_train_phase_is_finished_and_its_step_reported(tmp_path: Path):
    controller, actor, _, rows, folder = make(tmp_path, right={"0"}, num_rollout_steps=5)
    train = actor.train

    async def train_and_stop(batch: TrainBatch, rollout_step: int) -> dict[str, float]:
        stopping(controller)
        return await train(batch, rollout_step)

    actor.train = train_and_stop
    assert not await controller.run()
    assert [row["rollout_step"] for row in rows] == [1]
    assert [path.name for path in folder.complete_checkpoints()] == ["step_000001"]


async def test_a_save_under_way_is_waited_for_and_not_repeated(tmp_path: Path):
    controller, actor, _, rows, folder = make(tmp_path, right={"0"}, num_rollout_steps=9)
    start_save = actor.start_save

    async def save_and_stop(directory: Path) -> None:
        stopping(controller)
        await start_save(directory)

    actor.start_save = save_and_stop
    assert not await controller.run()
    assert [call for call in actor.calls if call[0] == "save"] == [("save", "step_000002.tmp")]
    assert [path.name for path in folder.complete_checkpoints()] == ["step_000002"] and len(rows) == 2


async def test_a_dropped_evaluation_is_measured_after_the_restart_and_no_row_is_missing(tmp_path: Path):
    controller, _, _, rows, folder = make(tmp_path, right={"0"}, num_rollout_steps=1)

    async def evaluate() -> dict[str, float]:
        stopping(controller)
        await asyncio.sleep(60)
        return {}

    controller._evaluate = evaluate
    assert not await controller.run()
    assert rows == []
    state = read_state(folder.checkpoints / "step_000001")
    assert state.unreported is not None and state.num_steps == 1

    again, *_, rows, _ = make(tmp_path, right={"0"}, num_rollout_steps=1, state=state)

    async def evaluate_now() -> dict[str, float]:
        return {"eval/accuracy": 0.5}

    again._evaluate = evaluate_now
    assert await again.run()
    (row,) = rows
    assert row["rollout_step"] == 1 and row["eval/accuracy"] == 0.5 and row["weights/version"] == 1
    assert row["time/train_seconds"] == state.unreported["time/train_seconds"]


async def test_a_rollout_sampled_ahead_is_finished_and_saved(tmp_path: Path):
    controller, _, engine, rows, folder = make(tmp_path, right={"0"}, num_rollout_steps=3, rollout_lag=1)
    generate = engine.generate

    async def generate_late(requests: Any) -> AsyncIterator[Any]:
        if rows:
            stopping(controller)
        async for result in generate(requests):
            yield result

    engine.generate = generate_late
    assert not await controller.run()
    state = read_state(folder.complete_checkpoints()[-1])
    assert state.rollout is not None and state.sampler.next_group_id == 2 * (state.num_steps + 1)


async def test_nothing_is_saved_where_nothing_was_done(tmp_path: Path):
    controller, actor, _, rows, folder = make(tmp_path, right={"0"}, num_rollout_steps=3)
    load = actor.send_weights

    async def send_and_stop(version: int) -> AsyncIterator[str]:
        stopping(controller)
        async for message in load(version):
            yield message

    actor.send_weights = send_and_stop
    assert not await controller.run()
    assert rows == [] and folder.complete_checkpoints() == [] and [name for name, _ in actor.calls] == ["send"]


async def test_a_stop_that_cannot_be_saved_says_so(tmp_path: Path):
    controller, actor, _, _, _ = make(tmp_path, right={"0"}, num_rollout_steps=3)
    train = actor.train

    async def train_and_stop(batch: TrainBatch, rollout_step: int) -> dict[str, float]:
        stopping(controller)
        actor.save_error = "No space left on device"
        return await train(batch, rollout_step)

    actor.train = train_and_stop
    with pytest.raises(
        StopNotSavedError, match="after rollout step 1, which could not be saved; starting again goes back to the beginning"
    ):
        await controller.run()


def test_exit_codes_say_whether_to_start_again():
    assert [int(code) for code in ExitCode] == [0, 1, 2, 85, 86, 87] and set(MEANINGS) == set(ExitCode)
    assert (
        code_of(ConfigError("x")) == code_of(CheckpointError("x")) == code_of(AssertionError()) == code_of(KeyError("a bug")) == 2
    )
    assert code_of(WorkerDiedError("x")) == code_of(StopNotSavedError("x")) == code_of(ConnectionResetError()) == 1
    assert code_of(StalledError("x")) == 86
