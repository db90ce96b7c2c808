"""Whole runs from the command line: real Ray, real megatron ranks over gloo, the embedded engine, real reward workers."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
QUICKSTART = REPOSITORY / "configs" / "quickstart.yaml"
TIMED = ("time/", "throughput/", "checkpoint/")


def command(folder: Path, *overrides: str, name: str = "run") -> list[str]:
    """The quick start; it is run in `folder`, where its assets then lie too."""
    return [sys.executable, "-m", "dapo_megatron", "train", str(QUICKSTART), "--run.dir", str(folder / name), *overrides]


def train(folder: Path, *overrides: str, name: str = "run") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(folder, *overrides, name=name), cwd=folder, capture_output=True, text=True, timeout=280, check=False
    )


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def untimed(run: Path) -> list[dict[str, Any]]:
    """The rows without what a clock decided."""
    return [{name: value for name, value in row.items() if not name.startswith(TIMED)} for row in rows(run)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("e2e")


@pytest.fixture(scope="module")
def whole_run(folder: Path) -> Path:
    """30 steps in one go, checkpoints every 15."""
    done = train(folder, "--train.num_rollout_steps", "30", "--checkpoint.every", "15", name="whole")
    assert done.returncode == 0, done.stderr
    return folder / "whole"


@pytest.mark.timeout(300)
def test_the_quick_start_learns(whole_run: Path):
    accuracy = [row["rollout/accuracy"] for row in rows(whole_run) if "rollout/accuracy" in row]
    assert accuracy[0] < 0.1
    assert sum(accuracy[-5:]) / 5 > 0.3


def test_every_step_has_one_row_with_the_promised_metrics(whole_run: Path):
    recorded = rows(whole_run)
    assert [row["rollout_step"] for row in recorded] == list(range(1, 31))
    assert [row["weights/version"] for row in recorded] == list(range(1, 31))
    promised = [
        "rollout/accuracy",
        "rollout/reward",
        "rollout/response_length_tokens",
        "rollout/truncated_fraction",
        "rollout/num_groups_kept",
        "rollout/num_groups_all_correct",
        "rollout/num_groups_all_wrong",
        "rollout/num_tokens_generated",
        "actor/loss",
        "actor/grad_norm",
        "actor/entropy_nats",
        "actor/mean_probability",
        "actor/clip_fraction_low",
        "actor/clip_fraction_high",
        "actor/log_prob_diff_max",
        "actor/learning_rate",
        "weights/version",
        "time/rollout_seconds",
        "time/train_seconds",
        "time/sync_seconds",
        "time/step_seconds",
        "throughput/tokens_per_second",
    ]
    assert not set(promised) - set(recorded[0])


def test_actor_and_engine_agree_on_every_log_prob(whole_run: Path):
    assert max(row.get("actor/log_prob_diff_max", 0.0) for row in rows(whole_run)) < 1e-4


def test_the_run_folder_tells_what_ran(whole_run: Path):
    description = json.loads((whole_run / "config.json").read_text())
    assert description["config"]["actor"]["tensor_parallel_size"] == 2
    assert description["versions"]["megatron-core"] == "0.19.2"
    assert sorted(path.name for path in (whole_run / "checkpoints").iterdir()) == ["step_000015", "step_000030"]
    assert list((whole_run / "tensorboard").iterdir())


def test_a_finished_run_says_so_and_starts_nothing(folder: Path, whole_run: Path):
    done = train(folder, "--train.num_rollout_steps", "30", name="whole")
    assert done.returncode == 0 and "end of this run already" in done.stdout


def test_the_first_gradient_is_the_same_under_another_layout(folder: Path, whole_run: Path):
    done = train(
        folder,
        *("--actor.tensor_parallel_size", "1", "--actor.pipeline_parallel_size", "2", "--train.num_rollout_steps", "1"),
        name="pp2",
    )
    assert done.returncode == 0, done.stderr
    (first,) = rows(folder / "pp2")
    assert first["actor/grad_norm"] == pytest.approx(rows(whole_run)[0]["actor/grad_norm"], rel=1e-5)


def started(run: Path, num_rows: int, process: subprocess.Popen[str]) -> None:
    """Wait until the run has written so many rows."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        if (run / "metrics.jsonl").is_file() and len(rows(run)) >= num_rows:
            return
        time.sleep(0.05)
    raise AssertionError(f"the run wrote fewer than {num_rows} rows; exit status {process.poll()}")


def kill_one(kind: str, run: Path) -> None:
    """kill -9 the Ray process of that kind which writes into this run's logs."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            name = (process / "cmdline").read_bytes().split(b"\0")[0].decode()
            writes_here = os.readlink(process / "fd" / "1").startswith(str(run / "logs"))
        except (FileNotFoundError, PermissionError, ProcessLookupError):
            continue
        if name.startswith(f"ray::{kind}") and writes_here:
            os.kill(int(process.name), signal.SIGKILL)
            return
    raise AssertionError(f"no ray::{kind} process of {run} found")


@pytest.mark.timeout(300)
def test_a_run_with_a_killed_rank_names_it_and_resumes_as_if_nothing_had_happened(folder: Path, whole_run: Path):
    steps = ("--train.num_rollout_steps", "30", "--checkpoint.every", "15")
    with subprocess.Popen(
        command(folder, *steps, name="dies"), cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        started(folder / "dies", 17, process)
        kill_one("RankProcess", folder / "dies")
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert re.search(r"actor rank \d died .*Last lines of .*actor_rank_0000\d.log", errors, re.DOTALL), errors
    done = train(folder, *steps, name="dies")
    assert done.returncode == 0, done.stderr
    assert untimed(folder / "dies") == untimed(whole_run)


@pytest.mark.timeout(300)
def test_a_killed_engine_restarts_the_run_from_its_checkpoint(folder: Path, whole_run: Path):
    with subprocess.Popen(
        command(
            folder, "--train.num_rollout_steps", "30", "--checkpoint.every", "15", "--run.max_restarts", "1", name="restarts"
        ),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        started(folder / "restarts", 17, process)
        kill_one("EngineProcess", folder / "restarts")
        output, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert "engine 0 died" in output and "starting again from" in output
    assert untimed(folder / "restarts") == untimed(whole_run)
