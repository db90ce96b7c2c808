"""A run told to stop in any phase ends with code 85, and the same command goes on as if nothing had been."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from dapo_megatron.launcher.run_folder import RunFolder
from tests.e2e.runs import descendants, processes_of, rows, run, training_rows
from tests.e2e.test_exact_resume import assert_same_end, started, wait_for

pytestmark = pytest.mark.timeout(300)
STOPS = ("1:rollout", "1:train", "3:eval", "4:save", "6:rollout", "6:sync")
"""Rollout step and phase. phase.json counts a step as done before its evaluation: `3:eval` is that of step 2; `6:sync` comes first after a
restart."""


def run_and_stop(folder: Path, name: str, *stops: str) -> list[int]:
    done = run(folder, str(folder), name, *stops, module="tests.e2e.stopping", seconds=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return [int(code) for code in re.findall(r"exit code (\d+)", done.stdout)]


def with_evaluations(run: Path) -> list[tuple[dict[str, Any], float | None]]:
    return [(row, full.get("eval/accuracy")) for row, full in zip(training_rows(run), rows(run), strict=True)]


def test_metrics_are_those_of_a_run_that_was_not_stopped(folder: Path):
    assert run_and_stop(folder, "unstopped") == [0]
    assert run_and_stop(folder, "stopped", *STOPS) == [85] * 6 + [0]
    assert with_evaluations(folder / "stopped") == with_evaluations(folder / "unstopped")
    assert sum(accuracy is not None for _, accuracy in with_evaluations(folder / "stopped")) == 3


def test_ranks_and_engines_outlive_a_signal_to_all_processes_until_the_checkpoint_is_complete(folder: Path, whole_run: Path):
    run = folder / "all_signalled"
    with started(folder, run.name, "--checkpoint.every", "50") as process:
        wait_for(run, process, 3, "rollout")
        for pid in (process.pid, *descendants(process.pid)):
            os.kill(pid, signal.SIGTERM)
        assert process.wait(timeout=100) == 85, (folder / f"{run.name}.out").read_text()
    newest = RunFolder(run).newest_checkpoint()
    assert newest is not None and f"stopped by SIGTERM; the same command goes on from {newest}" in " ".join(
        (folder / f"{run.name}.out").read_text().split()
    )
    with started(folder, run.name, "--checkpoint.every", "50") as process:
        assert process.wait(timeout=200) == 0, (folder / f"{run.name}.out").read_text()
    assert_same_end(run, whole_run)


def test_a_rank_that_stands_still_is_found_and_its_stack_kept_before_the_run_ends(folder: Path):
    run = folder / "stalled"
    with started(folder, run.name, "--cluster.phase_deadline_seconds", "12", "--run.max_restarts", "3") as process:
        wait_for(run, process, 2, "rollout")
        ranks = processes_of(run, "RankProcess")
        os.kill(ranks[0], signal.SIGSTOP)
        code = process.wait(timeout=120)
    output = (folder / f"{run.name}.out").read_text()
    assert code == 86, output
    assert re.search(r"phase \w+ did not end within 12 s \(cluster.phase_deadline_seconds\)", output)
    (stall,) = (run / "stalls").iterdir()
    assert "stopped (SIGSTOP)" in (stall / "summary.txt").read_text()
    assert {path.name.rpartition("_")[0] for path in stall.iterdir()} >= {
        "controller",
        "actor_rank_0",
        "actor_rank_1",
        "engine_0",
        "reward_worker",
    }
    assert "train_micro_batches" in "".join(path.read_text() for path in stall.glob("actor_rank_*"))
    deadline = time.monotonic() + 30
    while processes_of(run) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not processes_of(run), "what stood still is ended too"
