"""One run of the quick start that several files look at: starting a run costs more than its steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.runs import quickstart, run_as_users_do

NUM_STEPS = 30
EVALUATION = ("--eval.interval", "6", "--eval.num_samples", "48", "--eval.temperature", "1", "--eval.top_p", "0.95")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working directory of the runs, with the quick start's assets."""
    return tmp_path_factory.mktemp("e2e")


@pytest.fixture(scope="session")
def whole_run(folder: Path) -> Path:
    """30 steps in one go; a checkpoint and an evaluation every 6."""
    steps = ("--train.num_rollout_steps", str(NUM_STEPS), "--checkpoint.every", "6", "--checkpoint.keep_last", "5")
    done = run_as_users_do(folder, *quickstart(folder, *steps, *EVALUATION, name="whole"))
    assert done.returncode == 0, done.stderr
    return folder / "whole"
