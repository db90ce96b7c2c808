"""6 steps = some + kill -9 anywhere + the rest: the same rows, the same weights and optimizer bit for bit."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dapo_megatron.launcher.run_folder import read_marker
from tests.e2e.forked import Forked
from tests.e2e.runs import kill_one, processes_of, quickstart, rows, train, training_rows

pytestmark = pytest.mark.timeout(600)  # starting the run they share counts for whoever comes first

STEPS = ("--train.num_rollout_steps", "6", "--eval.path", "null")
KILLS = (
    ("RankProcess", 2, "rollout"),
    ("EngineProcess", 3, "rollout"),
    ("RankProcess", 4, "train"),
    ("EngineProcess", 4, "sync"),
    ("RankProcess", 5, "save"),
)
"""Who dies, and in which phase of which rollout step at the earliest."""
LATEST_SECONDS = 0.2
"""A kill comes so long after the beginning of its phase, at most: some fall into the phase after it."""


def wait_for(run: Path, process: Forked, rollout_step: int, phase: str, not_attempt: float = 0.0) -> float:
    """Until another attempt than that is in that phase of that rollout step, or behind it. Returns which attempt."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        if (run / "phase.json").is_file():
            note = json.loads((run / "phase.json").read_text())
            there = (note["rollout_step"], note["phase"]) == (rollout_step, phase) or note["rollout_step"] > rollout_step
            if there and note["attempt_started"] != not_attempt:
                return note["attempt_started"]
        time.sleep(0.002)
    raise AssertionError(f"{run} did not come to {phase} of step {rollout_step}; exit status {process.poll()}")


@contextmanager
def started(folder: Path, name: str, *overrides: str) -> Iterator[Forked]:
    """With a checkpoint of every step; killed at the end."""
    output = folder / f"{name}.out"
    output.unlink(missing_ok=True)
    arguments = quickstart(folder, *STEPS, "--checkpoint.every", "1", *overrides, name=name)
    with Forked(arguments, folder, output) as process:
        try:
            yield process
        finally:
            process.kill()


def assert_same_end(run: Path, whole: Path) -> None:
    assert training_rows(run) == training_rows(whole)[:6]
    ends = [read_marker(folder / "checkpoints" / "step_000006").files for folder in (run, whole)]
    tensors = [{name: digest for name, digest in files.items() if name.endswith(".distcp")} for files in ends]
    assert len(tensors[0]) == 4 and tensors[0] == tensors[1], "weights and optimizer differ"


def test_ranks_and_engines_may_die_in_any_phase(folder: Path, whole_run: Path):
    run = folder / "ranks_and_engines"
    delays = random.Random(0)
    with started(folder, run.name, "--run.max_restarts", str(len(KILLS))) as process:
        attempt = 0.0
        for kind, rollout_step, phase in KILLS:
            attempt = wait_for(run, process, rollout_step, phase, not_attempt=attempt)
            time.sleep(delays.uniform(0, LATEST_SECONDS))
            kill_one(run, kind)
        process.wait(timeout=200)
    output = (folder / f"{run.name}.out").read_text()
    assert process.returncode == 0, output
    assert len(re.findall(r"starting again from", output)) == len(KILLS)
    assert re.search(r"actor rank \d died .*Last lines of .*actor_rank_0000\d.log", output, re.DOTALL), output
    assert re.search(r"engine 0 died", output)
    assert_same_end(run, whole_run)


def test_the_controller_may_die_in_any_phase(folder: Path, whole_run: Path):
    run = folder / "controller"
    delays = random.Random(1)
    attempt = 0.0
    for rollout_step, phase in ((2, "train"), (4, "save")):
        with started(folder, run.name) as process:
            attempt = wait_for(run, process, rollout_step, phase, not_attempt=attempt)
            time.sleep(delays.uniform(0, LATEST_SECONDS))
        deadline = time.monotonic() + 30
        while processes_of(run) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not processes_of(run), "ranks or engines outlive their controller"
    with started(folder, run.name) as process:
        process.wait(timeout=200)
    assert process.returncode == 0, (folder / f"{run.name}.out").read_text()
    assert [row["rollout_step"] for row in rows(run)] == [1, 2, 3, 4, 5, 6]
    assert_same_end(run, whole_run)


def test_what_changed_since_the_checkpoint_is_named_before_anything_starts(folder: Path, whole_run: Path):
    changed = ("--train.num_rollout_steps", "31", "--actor.optimizer.lr", "0.5", "--seed", "3", "--allow-changed", "run.seed")
    done = train(folder, *changed, name="whole")
    assert done.returncode == 2
    assert "actor.optimizer.lr is 0.5, but was 0.001" in done.stderr and "--allow-changed actor.optimizer.lr" in done.stderr
    assert "run.seed" not in done.stderr
    assert len(rows(whole_run)) == 30
