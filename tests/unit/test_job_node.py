"""The task of a node of a job, up to the run: what it leaves for the batch script, and how a node that cannot be used is named."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from dapo_megatron.config.schema import Config
from dapo_megatron.launcher.slurm import network, node, scheduler, time_limit
from dapo_megatron.launcher.slurm.job import Job, JobNode
from dapo_megatron.launcher.slurm.preflight import EXCLUDED
from dapo_megatron.launcher.slurm.time_limit import TimeLimit
from dapo_megatron.types import BadNodeError, ConfigError, WorkerDiedError

LOCAL = {"cluster": {"backend": "local"}, "slurm": {"gpus_per_node": 0}}


@pytest.fixture(autouse=True)
def task_of_a_job(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Job 7 on node1, for the second time."""
    step = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_JOB_NODELIST": "node1", "SLURM_RESTART_COUNT": "1"}
    for name, value in {**step, "DAPO_NODE_ADDRESS": "", "RAY_AUTH_MODE": "", "RAY_AUTH_TOKEN": ""}.items():
        monkeypatch.setenv(name, value)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def config_file(run_dir: Path, **sections: Any) -> Path:
    """Of the job."""
    tree = {"model": {"path": "none"}, "data": {"path": "none"}, "run": {"dir": str(run_dir)}, **sections}
    (run_dir / "slurm").mkdir()
    (run_dir / "slurm" / "config.json").write_text(json.dumps(tree))
    return run_dir / "slurm" / "config.json"


def left_code(run_dir: Path) -> str:
    return (run_dir / "slurm" / "nodes" / "7_1" / node.EXIT_CODE).read_text()


def ends_with(code: int) -> node.Train:
    return lambda config, *, check_only, cluster=None: code


def fails_with(error: Exception) -> node.Train:
    def train(config: Config, *, check_only: bool, cluster: object = None) -> int:
        raise error

    return train


def test_the_code_of_a_run_is_left_for_the_batch_script(tmp_path: Path):
    file = config_file(tmp_path, **LOCAL)
    for code in (85, 0):
        assert node.run_node(file, ends_with(code)) == code
        assert left_code(tmp_path) == f"{code}\n"
    for error, meant in ((WorkerDiedError("rank 3 died"), "1\n"), (KeyError("a bug"), "2\n")):
        with pytest.raises(type(error)):
            node.run_node(file, fails_with(error))
        assert left_code(tmp_path) == meant


def test_settings_that_cannot_be_read_are_a_code_too_and_only_the_first_task_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = config_file(tmp_path, nonsense={})
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node[1-2]")
    monkeypatch.setenv("SLURM_PROCID", "1")
    with pytest.raises(ConfigError):
        node.run_node(file, ends_with(0))
    assert not (tmp_path / "slurm" / "nodes").exists()
    monkeypatch.setenv("SLURM_PROCID", "0")
    with pytest.raises(ConfigError, match="nonsense"):
        node.run_node(file, ends_with(0))
    assert left_code(tmp_path) == "2\n"


def test_a_run_in_one_process_is_checked_before_it_starts(tmp_path: Path):
    missing_gpus = {"gpus_per_node": 64, "exclude_bad_nodes": True}
    file = config_file(tmp_path, cluster={"backend": "local"}, slurm=missing_gpus)
    with pytest.raises(BadNodeError, match=r"preflight: node1 cannot run this; left out .* node1: GPUs: \d+ GPUs, 64 wanted"):
        node.run_node(file, fails_with(AssertionError("it was started")))
    assert left_code(tmp_path) == "87\n" and (tmp_path / "slurm" / EXCLUDED).read_text() == "node1\n"
    file.write_text(file.read_text().replace('"slurm": {', '"slurm": {"preflight": false, '))
    assert node.run_node(file, ends_with(0)) == 0


@pytest.mark.parametrize("preflight", [True, False])
def test_a_node_that_others_cannot_reach_says_so_to_the_first_one_which_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preflight: bool
):
    monkeypatch.setattr(node, "_ray", lambda *args, **options: nullcontext())
    slurm = {"gpus_per_node": 0, "exclude_bad_nodes": True, "preflight": preflight}
    paths = {"model": {"path": "none"}, "data": {"path": "none"}, "run": {"dir": str(tmp_path)}}
    config = Config.model_validate({**paths, "slurm": slurm})
    folder = tmp_path / "slurm" / "nodes" / "7_0"
    jobs = [Job("7", 0, (JobNode("node1"), JobNode("node2")), task) for task in (0, 1)]
    here = node._Reach("127.0.0.1", network.free_ports("127.0.0.1", config.slurm, seed=7 + preflight))
    with ThreadPoolExecutor(1) as other:
        follower = other.submit(node._follow, config, jobs[1], folder, node._Reach(problem="no port is free"))
        with pytest.raises(BadNodeError, match=r"node2 cannot run this; left out from now on .* node2: ports: no port is free"):
            node._lead(config, fails_with(AssertionError("it was started")), jobs[0], folder, here)
        assert follower.result(10) == 0
    assert (tmp_path / "slurm" / EXCLUDED).read_text() == "node2\n"


@pytest.mark.parametrize(
    ("rows", "settings", "ends", "is_near"),
    [
        ("", {}, ["2026-01-01T00:00:10"], False),
        ('{"checkpoint/write_seconds": 1000}\n', {"signal_lead_seconds": 60}, ["2026-01-01T00:00:10"], False),
        ('{"checkpoint/write_seconds": 1000}\n', {}, ["2026-01-01T00:26:01"], False),
        ('{"checkpoint/write_seconds": 1000}\n', {}, ["2026-01-01T00:26:00"], True),
        ('{"checkpoint/write_seconds": 1000}\n', {}, ["2026-01-01T00:26:00", "2026-01-01T12:00:00"], False),
        ('{"checkpoint/write_seconds": 1000}\n', {}, [None], False),
    ],
    ids=["nothing measured", "set by the user", "early enough", "near", "extended", "no limit"],
)
def test_a_time_limit_is_near_when_a_save_takes_as_long_as_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: str, settings: dict, ends: list[str | None], is_near: bool
):
    (tmp_path / "metrics.jsonl").write_text(rows)
    paths = {"model": {"path": "none"}, "data": {"path": "none"}, "run": {"dir": str(tmp_path)}}
    limit = TimeLimit(Config.model_validate({**paths, "slurm": settings}), "7")
    told = iter(ends)

    def find_job(job_id: str) -> scheduler.Job:
        ends_now = next(told, ends[-1])
        return scheduler.Job(job_id, "RUNNING", None, "node1", 0, 0, None, None, None, ends_now)

    monkeypatch.setattr(scheduler, "find_job", find_job)
    assert limit.is_near(datetime(2026, 1, 1).timestamp()) is is_near


def test_a_run_is_asked_to_save_by_the_signal_that_slurm_sends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(time_limit, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(TimeLimit, "is_near", lambda limit, now: True)

    heard: list[int] = []  # by the handler where another thread of the test runner takes the signal; else it waits, blocked

    def train(config: Config, *, check_only: bool, cluster: object = None) -> int:
        end = time.monotonic() + 20
        while not heard and time.monotonic() < end:
            heard.extend([signal.SIGUSR1] if signal.sigtimedwait([signal.SIGUSR1], 0.01) else [])
        return 85 if heard else 1

    before = signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    try:
        assert node.run_node(config_file(tmp_path, **LOCAL), train) == 85
    finally:
        signal.signal(signal.SIGUSR1, before)
