"""`dapo-megatron status`: where a run stands, by Slurm and by its folder."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from dapo_megatron.launcher.run_folder import PhaseNote, RunFolder, read_phase
from dapo_megatron.launcher.slurm import scheduler
from dapo_megatron.launcher.slurm.record import JobRecords, Submission
from dapo_megatron.launcher.slurm.scheduler import Job
from dapo_megatron.types import ConfigError

SHOWN = (
    "rollout/accuracy",
    "rollout/reward",
    "actor/loss",
    "actor/grad_norm",
    "rollout/response_length_tokens",
    "time/step_seconds",
)
"""Metrics of the last rollout step that are shown."""
REASONS = {
    "BeginTime": "Slurm holds a job back for two minutes after it was put into the queue again",
    "Dependency": "it waits for another job",
    "DependencyNeverSatisfied": "the job it waits for failed; cancel it",
    "JobHeldUser": "held; scontrol release lets it go",
    "JobHeldAdmin": "held by an administrator",
    "Licenses": "it waits for a licence",
    "PartitionConfig": "no node of the partition has what it asks for: it would wait for ever, cancel it",
    "PartitionDown": "the partition takes no jobs now",
    "PartitionNodeLimit": "more nodes than the partition gives one job: it would wait for ever, cancel it",
    "PartitionTimeLimit": "a longer time limit than the partition gives: it would wait for ever, cancel it",
    "Priority": "others come first",
    "ReqNodeNotAvail": "nodes it asks for are down or reserved",
    "Resources": "it is next, nodes are busy",
}
"""Slurm's reasons why a job is pending, in words."""


@dataclass(frozen=True, slots=True)
class RunStatus:
    """A run at this moment. None: not known."""

    run_dir: Path
    submission: Submission | None
    job: Job | None
    ended_as: str | None
    """State by Slurm's accounts, of a job that Slurm has forgotten."""
    last_words: str | None
    phase: PhaseNote | None
    num_rollout_steps: int | None
    """That the run is meant to have."""
    last_row: dict[str, Any] | None
    checkpoint: Path | None


def runs_of(target: str) -> list[Path]:
    """Run folders of a run, a sweep, or a job id. ConfigError when there is nothing."""
    folder = Path(target)
    if re.fullmatch(r"\d+(_\d+)?", target) and not folder.exists():
        folder = _folder_of_job(target)
    records = JobRecords(folder)
    if runs := records.sweep():
        element = re.fullmatch(r"\d+_(\d+)", target)
        return [runs[int(element[1])]] if element and int(element[1]) < len(runs) else runs
    if not folder.is_dir():
        raise ConfigError(f"{target} is neither a run folder nor the id of a job; give the run.dir that submit printed.")
    return [folder]


def runs_in_queue() -> list[Path]:
    """Run folders of this user's jobs that have not ended."""
    folders = [folder for folder in scheduler.own_working_dirs() if JobRecords(folder).script_file.is_file()]
    return [run for folder in folders for run in runs_of(str(folder))]


def _folder_of_job(job_id: str) -> Path:
    job = scheduler.find_job(job_id)
    if job is None or job.working_dir is None:
        raise ConfigError(f"Slurm knows no job {job_id} (any more); give the run folder.")
    if not JobRecords(job.working_dir).script_file.is_file():
        raise ConfigError(f"job {job_id} is none of dapo-megatron submit: there is no run in {job.working_dir}.")
    return job.working_dir


def status_of(run_dir: Path) -> RunStatus:
    """What Slurm and the run folder say now."""
    records, folder = JobRecords(run_dir), RunFolder(run_dir)
    submission = records.newest()
    job = scheduler.find_job(submission.job_id) if submission else None
    return RunStatus(
        run_dir=run_dir,
        submission=submission,
        job=job,
        ended_as=scheduler.accounted_state(submission.job_id) if submission and job is None else None,
        last_words=records.last_words(),
        phase=read_phase(folder.phase_file) if folder.phase_file.is_file() else None,
        num_rollout_steps=_num_rollout_steps(records.config_file),
        last_row=_last_row(folder.metrics_file),
        checkpoint=folder.newest_checkpoint(),
    )


def show(status: RunStatus, console: Console) -> None:
    """In lines of a name and what there is to say."""
    for name, text in lines_of(status):
        console.print(f"{name:>10}  {text}", markup=False, highlight=False, soft_wrap=True)


def lines_of(status: RunStatus) -> Iterator[tuple[str, str]]:
    """Names and texts, in order."""
    yield "run", str(status.run_dir)
    yield "job", _job_line(status)
    if status.job and status.job.state == "PENDING" and status.job.reason:
        words = REASONS.get(status.job.reason)
        starts = f"; starts {status.job.starts} at the latest, as Slurm sees it now" if status.job.starts else ""
        yield "reason", f"{status.job.reason}{f': {words}' if words else ''}{starts}"
    if status.last_words:
        yield "history", status.last_words
    if status.job and status.job.num_restarts:
        yield "restarts", str(status.job.num_restarts)
    if status.phase and status.job and status.job.state == "RUNNING":
        yield (
            "now",
            f"{status.phase.phase} of rollout step {status.phase.rollout_step} for {time.time() - status.phase.since:.0f} s",
        )
    if status.last_row:
        yield "step", _step_line(status.last_row, status.num_rollout_steps)
    yield "saved", status.checkpoint.name if status.checkpoint else "no checkpoint yet"
    if status.submission:
        yield "log", str(status.submission.log)
    yield "ranks", str(RunFolder(status.run_dir).logs)


def _job_line(status: RunStatus) -> str:
    submission, job = status.submission, status.job
    if submission is None:
        return "none was submitted for this run folder"
    if job is None:
        state = status.ended_as or "Slurm has forgotten it"
        return f"{submission.job_id}, submitted {submission.submitted}: {state}"
    if job.state in ("PENDING", "COMPLETED"):
        return f"{job.job_id} {job.state}"
    seconds = job.run_seconds
    return (
        f"{job.job_id} {job.state} on {job.nodes or 'no nodes'} for {seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
    )


def _step_line(row: dict[str, Any], last: int | None) -> str:
    shown = "  ".join(f"{name.rpartition('/')[2]} {row[name]:.4g}" for name in SHOWN if name in row)
    return f"{row['rollout_step']}{f' of {last}' if last else ''}  {shown}"


def _num_rollout_steps(config_file: Path) -> int | None:
    if not config_file.is_file():
        return None
    return json.loads(config_file.read_text())["train"]["num_rollout_steps"]


def _last_row(metrics_file: Path) -> dict[str, Any] | None:
    """The last whole one; the file may be in the middle of a line."""
    if not metrics_file.is_file():
        return None
    whole = [line for line in metrics_file.read_text().splitlines()[-2:] if line.endswith("}")]
    return json.loads(whole[-1]) if whole else None
