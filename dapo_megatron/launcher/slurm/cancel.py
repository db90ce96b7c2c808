"""`dapo-megatron cancel`: ask runs for a checkpoint, wait for it, then end their jobs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from dapo_megatron.launcher.slurm import scheduler
from dapo_megatron.launcher.slurm.lead import UNMEASURED_SECONDS
from dapo_megatron.launcher.slurm.record import JobRecords
from dapo_megatron.launcher.slurm.scheduler import Job

POLL_SECONDS = 0.5


def cancel(run_dirs: Sequence[Path], *, now: bool, console: Console) -> None:
    """End the jobs of runs. Without `now` running ones may save first, for as long as they may before their time limits.

    Ctrl-C while they save leaves the requests: the jobs end without us, and do not start again.
    """
    asked: list[tuple[JobRecords, Job, float]] = []
    for run_dir in run_dirs:
        records = JobRecords(run_dir)
        newest = records.newest()
        if newest is None:
            _say(console, f"{run_dir}: no job was submitted")
            continue
        job = scheduler.find_job(newest.job_id)
        if job is None or job.ended:
            _say(console, f"{run_dir}: job {newest.job_id} has ended already")
        elif now or job.state != "RUNNING":
            _cancel_now(job, console)
        else:
            records.cancelled_file.write_text(job.job_id + "\n")
            scheduler.signal_batch(job.job_id, "USR1")
            _say(console, f"job {job.job_id} is asked to save a checkpoint and to end; --now ends it at once")
            asked.append((records, job, time.monotonic() + (newest.signal_lead_seconds or UNMEASURED_SECONDS)))
    for records, job, deadline in asked:
        if _ends_by_itself(job.job_id, deadline):
            _say(console, records.last_words() or f"job {job.job_id} has ended")
        else:
            _cancel_now(job, console)


def _ends_by_itself(job_id: str, deadline: float) -> bool:
    """False past the deadline, and when the job is back in the queue: it had decided so before it was asked."""
    while time.monotonic() < deadline:
        job = scheduler.find_job(job_id)
        if job is None or job.ended:
            return True
        if job.state == "PENDING":
            return False
        time.sleep(POLL_SECONDS)
    return False


def _cancel_now(job: Job, console: Console) -> None:
    scheduler.cancel(job.job_id)
    _say(console, f"job {job.job_id} is cancelled without a further checkpoint")


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
