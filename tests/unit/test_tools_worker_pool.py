"""The worker pool: disjoint tasks, claims that are checked, workers that die."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from checkpoint_tools.conversion import run_conversion
from checkpoint_tools.errors import InterruptedWork, WriteError
from checkpoint_tools.output_folder import open_output
from checkpoint_tools.worker_pool import Pool, Report, run_tasks
from dapo_megatron.types import CheckpointError, ConfigError


@dataclass(frozen=True)
class Square:
    number: int
    num_bytes: int = 8

    @property
    def name(self) -> str:
        return f"square {self.number}"


class Squares:
    def __init__(self, memory_bytes: int) -> None:
        self.memory_bytes = memory_bytes

    def work(self, task: Square, report: Report) -> Any:
        if task.number == -1:
            raise CheckpointError("file x is truncated")
        if task.number == -2:
            os.kill(os.getpid(), signal.SIGKILL)
        report(task.num_bytes)
        return [task.number**2, self.memory_bytes]

    def check(self, task: Square, record: Any, report: Report) -> bool:
        return record[0] == task.number**2


def pool(num_workers: int) -> Pool:
    return Pool(num_workers, 64 * 2**20)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_every_task_is_done_once_within_its_share_of_memory(num_workers: int):
    reported: list[int] = []
    done = list(run_tasks(pool(num_workers), Squares, [Square(n) for n in range(7)], {}, reported.append))
    assert {item.name: item.record[0] for item in done} == {f"square {n}": n**2 for n in range(7)}
    assert {item.record[1] for item in done} == {64 * 2**20 // num_workers}
    assert sum(reported) == 7 * 8
    assert (os.getpid() in {item.process for item in done}) == (num_workers == 1)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_claim_is_kept_when_it_holds_and_done_again_when_not(num_workers: int):
    claims = {"square 2": [4, "kept"], "square 3": [8, "wrong"]}
    done = {item.name: item for item in run_tasks(pool(num_workers), Squares, [Square(2), Square(3)], claims, lambda _: None)}
    assert done["square 2"].was_kept and done["square 2"].record == [4, "kept"]
    assert not done["square 3"].was_kept and done["square 3"].record[0] == 9


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_users_error_in_a_worker_is_raised_as_it_is(num_workers: int):
    with pytest.raises(CheckpointError, match="^file x is truncated$"):
        list(run_tasks(pool(num_workers), Squares, [Square(1), Square(-1)], {}, lambda _: None))


def test_a_worker_that_dies_is_named_with_its_task():
    with pytest.raises(WriteError, match=r"the worker that had square -2 died \(SIGKILL\).*--max-memory"):
        list(run_tasks(pool(2), Squares, [Square(-2), Square(1), Square(2)], {}, lambda _: None))


def test_too_little_memory_for_the_workers_is_refused():
    with pytest.raises(ConfigError, match=r"--max-memory \(1.05 MB\) must be at least 8.39 MB for --workers 2"):
        Pool(2, 2**20)


def test_small_work_gets_one_worker():
    assert Pool.choose(None, 2**30, num_bytes=1000).num_workers == 1
    assert Pool.choose(3, 2**30, num_bytes=1000).num_workers == 3


def test_an_interrupted_conversion_says_how_far_it_is_and_goes_on(tmp_path: Path):
    class Interrupted(Squares):
        def work(self, task: Square, report: Report) -> Any:
            if task.number == 3:
                raise KeyboardInterrupt
            return super().work(task, report)

    tasks = [Square(number) for number in range(5)]
    with (
        open_output(tmp_path / "out", {}, force=False) as folder,
        pytest.raises(InterruptedWork, match="after 3 of 5 .* to go on"),
    ):
        run_conversion("squares", folder, pool(1), Interrupted, tasks)
    with open_output(tmp_path / "out", {}, force=False) as folder:
        finished = run_conversion("squares", folder, pool(1), Squares, tasks)
    assert finished.num_kept == 3 and finished.records["square 4"][0] == 16
