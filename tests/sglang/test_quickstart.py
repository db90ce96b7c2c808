"""The quick start on two SGLang servers, one of which is killed on the way."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.e2e.runs import REPOSITORY, rows
from tests.sglang.conftest import needs_sglang

pytestmark = [pytest.mark.sglang, needs_sglang, pytest.mark.timeout(500)]

NUM_STEPS = 45


def server_pid(log: Path) -> int:
    """Of the first process of the server that wrote the log: uvicorn names it."""
    return int(re.findall(r"Started server process \[(\d+)\]", log.read_text())[-1])


def test_task_is_learnt_on_two_servers_although_one_is_killed(tmp_path: Path):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "dapo_megatron", "train", str(REPOSITORY / "configs" / "quickstart_sglang.yaml")]
    command += ["--run.dir", str(run), "--train.num_rollout_steps", str(NUM_STEPS), "--checkpoint.every", "0"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        while process.poll() is None and not (run / "metrics.jsonl").is_file() or len(rows(run)) < 3:
            assert process.poll() is None, process.stdout and process.stdout.read()
            time.sleep(0.1)
        os.killpg(server_pid(run / "logs" / "engine_001.log"), signal.SIGKILL)
        output, _ = process.communicate()
    assert process.returncode == 0, output
    steps = rows(run)
    assert [row["rollout_step"] for row in steps] == list(range(1, NUM_STEPS + 1))
    assert "engine 1" in output and "is lost" in output
    first, last = (sum(row["rollout/accuracy"] for row in part) / 5 for part in (steps[:5], steps[-5:]))
    assert last > first + 0.3
    assert all(row["rollout/num_tokens_used"] + row["rollout/num_tokens_zero_variance"] > 0 for row in steps)
    assert all(row["actor/log_prob_diff_max"] < 1e-3 for row in steps if "actor/log_prob_diff_max" in row)
