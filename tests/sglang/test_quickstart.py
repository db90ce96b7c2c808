"""Whole runs over servers: the quick start on two of its own, one of which is killed; a run on servers that somebody else started."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from dapo_megatron.examples.max_of_two import split_pairs
from tests.e2e.forked import Forked
from tests.e2e.runs import REPOSITORY, rows
from tests.sglang.conftest import Pair, needs_sglang

pytestmark = [pytest.mark.sglang, needs_sglang, pytest.mark.timeout(500)]

NUM_STEPS = 45


class Run:
    """A `dapo-megatron train` of the SGLang quick start, with other settings."""

    def __init__(self, folder: Path, process: Forked | subprocess.Popen[bytes]):
        self.folder, self.process = folder / "run", process
        self._output = folder / "output"

    @property
    def output(self) -> str:
        """In one line: the console breaks its own."""
        return re.sub(r"\s+", " ", self._output.read_text())

    @property
    def rows(self) -> list[dict]:
        return rows(self.folder) if (self.folder / "metrics.jsonl").is_file() else []

    def wait_for(self, condition: Callable[[], object]) -> None:
        while not condition():
            assert self.process.poll() is None, self.output
            time.sleep(0.1)

    def wait_for_rows(self, num_more: int) -> None:
        wanted = len(self.rows) + num_more
        self.wait_for(lambda: len(self.rows) >= wanted)


def as_users_do(
    arguments: Sequence[str], folder: Path, output: Path, *, environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    """In place of Forked: in a process that is started as one of a shell is."""
    command = [sys.executable, "-m", "dapo_megatron", *arguments]
    with output.open("wb") as file:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=file, stderr=file)


@contextmanager
def training(folder: Path, *overrides: str, start: Callable[..., Forked | subprocess.Popen[bytes]] = Forked) -> Iterator[Run]:
    arguments = ["train", str(REPOSITORY / "configs" / "quickstart_sglang.yaml"), "--run.dir", str(folder / "run")]
    arguments += ["--checkpoint.every", "0", "--train.stop_at_accuracy", "null", *overrides]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "ENGINE_KEY": os.environ.get("ENGINE_KEY", "")}
    with start(arguments, folder, folder / "output", environment=environment) as process:
        try:
            yield Run(folder, process)
        finally:
            process.send_signal(signal.SIGTERM)


def version_on_return(output: str) -> int | None:
    """With which weights engine 1 serves again."""
    found = re.search(r"engine 1 serves again, with weight version (\d+)", output)
    return int(found[1]) if found else None


def assert_engine_samples_with_the_actors_weights(run: Run) -> None:
    differences = [row["actor/log_prob_diff_max"] for row in run.rows if "actor/log_prob_diff_max" in row]
    assert differences and max(differences) < 1e-3


def test_task_is_learnt_on_two_servers_although_one_is_killed_and_comes_back(tmp_path: Path):
    with training(tmp_path, "--train.num_rollout_steps", "1000", "--eval.path", "null", start=as_users_do) as run:
        run.wait_for_rows(3)
        log = run.folder / "logs" / "engine_001.log"
        first, *_ = re.findall(r"Started server process \[(\d+)\]", log.read_text())
        os.killpg(int(first), signal.SIGKILL)
        num_steps = len(run.rows)
        run.wait_for(lambda: version_on_return(run.output))
        answers = log.read_text().count("POST /generate")
        run.wait_for_rows(max(5, NUM_STEPS - len(run.rows)))
        assert version_on_return(run.output) >= num_steps
        assert log.read_text().count("POST /generate") > answers, "it takes requests again"
        steps = run.rows
        assert [row["rollout_step"] for row in steps] == list(range(1, len(steps) + 1))
        # A step of surplus groups alone has no accuracy.
        accuracy = [row["rollout/accuracy"] for row in steps if "rollout/accuracy" in row]
        before, after = sum(accuracy[:5]) / 5, sum(accuracy[-5:]) / 5
        assert after > before + 0.3
        assert all(row["rollout/num_tokens_used"] + row["rollout/num_tokens_zero_variance"] > 0 for row in steps)
        assert_engine_samples_with_the_actors_weights(run)


def test_run_on_servers_of_somebody_else_goes_on_while_one_hangs_and_sends_it_the_trained_weights(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"problem": "{a},{b}>", "answer": "even"}}\n' for a, b in split_pairs()[0]))
    urls = ",".join(f'"{endpoint.url}"' for endpoint in pair.endpoints)
    monkeypatch.setenv("ENGINE_KEY", str(pair.endpoints[0].api_key))
    settings = {
        "run.prepare": "null",
        "model.path": str(pair.model),
        "data.path": str(prompts),
        "eval.path": "null",
        "reward.type": "custom",
        "reward.function": "tests.sglang.reward:length_is_even",
        "actor.tensor_parallel_size": "1",
        "rollout.engine.engine_urls": f"[{urls}]",
        "rollout.engine.api_key_env": "ENGINE_KEY",
        "rollout.engine.health_interval_seconds": "1",
        "rollout.engine.health_deadline_seconds": "3",
        "train.num_rollout_steps": "1000",
    }
    hung = pair.servers["engine 1"].pid
    with training(tmp_path, *(part for name, value in settings.items() for part in (f"--{name}", value))) as run:
        try:
            run.wait_for_rows(2)
            os.killpg(hung, signal.SIGSTOP)
            run.wait_for(lambda: "engine 1 gave no sign of health" in run.output)
            run.wait_for_rows(2)
            num_steps = len(run.rows)
        finally:
            os.killpg(hung, signal.SIGCONT)
        run.wait_for(lambda: version_on_return(run.output))
        run.wait_for_rows(2)
        assert version_on_return(run.output) >= num_steps
        assert_engine_samples_with_the_actors_weights(run)
