"""Logs and status from the files of a run: no cluster is needed."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from dapo_megatron.launcher.slurm import scheduler
from dapo_megatron.launcher.slurm.logs import follow, job_has_ended, log_file
from dapo_megatron.launcher.slurm.record import JobRecords
from dapo_megatron.launcher.slurm.scheduler import Job
from dapo_megatron.launcher.slurm.status import lines_of, runs_of, status_of
from dapo_megatron.types import ConfigError, SchedulerError


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with one job."""
    (tmp_path / "run" / "slurm").mkdir(parents=True)
    JobRecords(tmp_path / "run").add("17")
    return tmp_path / "run"


def job(state: str, reason: str | None = None) -> Job:
    return Job("17", state, reason, "node[1-2]", 2, 3725, None, None, None)


def test_a_log_is_followed_over_replacement_and_truncation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("dapo_megatron.launcher.slurm.logs.POLL_SECONDS", 0)
    monkeypatch.setattr("dapo_megatron.launcher.slurm.logs.JOB_EVERY_SECONDS", 0)
    log = tmp_path / "log"
    new = tmp_path / "new"
    happenings = iter(
        [
            lambda: None,  # not there yet
            lambda: log.write_text("first\n"),
            lambda: log.open("a").write("more\n"),
            lambda: (new.write_text("second attempt, longer than the first one\n"), new.replace(log)),
            lambda: log.write_text("cut\n"),
            lambda: log.open("a").write("last\n"),
        ]
    )

    def ended() -> bool:
        happening = next(happenings, None)
        if happening:
            happening()
        return happening is None

    assert b"".join(follow(log, ended)).decode().splitlines() == [
        *("first", "more", "second attempt, longer than the first one", "cut", "last"),
    ]


def test_a_log_belongs_to_a_rank_or_to_the_job(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert log_file(run, None) == run / "slurm" / "17.log"
    assert log_file(run, 3) == run / "logs" / "actor_rank_00003.log"
    JobRecords(run).add("18_2")
    assert log_file(run, None) == tmp_path / "slurm" / "18_2.log"
    with pytest.raises(ConfigError, match="no job was submitted"):
        log_file(tmp_path, None)
    for state, ended in (("RUNNING", False), ("PENDING", False), ("COMPLETING", False), ("FAILED", True)):
        monkeypatch.setattr(scheduler, "find_job", lambda job_id, state=state: job(state))
        assert job_has_ended(run) is ended


def test_status_puts_the_queue_and_the_run_together(run: Path, monkeypatch: pytest.MonkeyPatch):
    (run / "phase.json").write_text(
        json.dumps({"rollout_step": 8, "phase": "train", "since": time.time() - 5, "attempt_started": 1.0})
    )
    (run / "slurm" / "config.json").write_text(json.dumps({"train": {"num_rollout_steps": 100}}))
    (run / "slurm" / "history").write_text("earlier\n2026-01-01 job 17, restart 2: on node[1-2]\n")
    rows = [{"rollout_step": step, "rollout/accuracy": 0.25, "time/step_seconds": 2} for step in (6, 7)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"rollout_s')
    monkeypatch.setattr(scheduler, "find_job", lambda job_id: job("RUNNING"))
    lines = dict(lines_of(status_of(run)))
    assert lines["job"] == "17 RUNNING on node[1-2] for 1:02:05"
    assert lines["now"].startswith("train of rollout step 8 for ")
    assert lines["step"] == "7 of 100  accuracy 0.25  step_seconds 2"
    assert (lines["restarts"], lines["history"]) == ("2", "2026-01-01 job 17, restart 2: on node[1-2]")
    monkeypatch.setattr(scheduler, "find_job", lambda job_id: job("PENDING", "PartitionNodeLimit"))
    assert dict(lines_of(status_of(run)))["reason"].endswith("it would wait for ever, cancel it")


def test_a_controller_that_is_busy_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(scheduler, "AGAIN_SECONDS", 0)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    asked = tmp_path / "asked"
    squeue = tmp_path / "squeue"
    busy = "slurm_load_jobs error: Socket timed out on send/recv operation"
    squeue.write_text(
        f"#!/bin/bash\necho >> {asked}\n[ $(wc -l < {asked}) -ge 3 ] && echo /runs/hot || {{ echo {busy} >&2; exit 1; }}\n"
    )
    squeue.chmod(0o755)
    assert scheduler.own_working_dirs() == [Path("/runs/hot")] and asked.read_text() == 3 * "\n"
    asked.unlink()
    squeue.write_text(f"#!/bin/bash\necho >> {asked}; echo Invalid user >&2; exit 1\n")
    with pytest.raises(SchedulerError, match="squeue: Invalid user"):
        scheduler.own_working_dirs()
    assert asked.read_text() == "\n"


def test_what_slurm_has_forgotten_is_in_its_accounts(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    commands = {
        "scontrol": "echo slurm_load_jobs error: Invalid job id specified >&2; exit 1",
        "sacct": "echo TIMEOUT; echo TIMEOUT",
    }
    for name, text in commands.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    assert dict(lines_of(status_of(run)))["job"].endswith(": TIMEOUT")
    (tmp_path / "sacct").write_text("#!/bin/bash\necho Slurm accounting storage is disabled >&2; exit 1\n")
    assert dict(lines_of(status_of(run)))["job"].endswith(": Slurm has forgotten it")
    with pytest.raises(ConfigError, match="neither a run folder nor the id of a job"):
        runs_of(str(tmp_path / "nothing"))
