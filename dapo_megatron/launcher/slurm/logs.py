"""`dapo-megatron logs`: the file in which something is written, followed over restarts."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from dapo_megatron.launcher.slurm import scheduler
from dapo_megatron.launcher.slurm.record import JobRecords
from dapo_megatron.types import ConfigError

POLL_SECONDS = 0.5
PIECE_BYTES = 1 << 16
JOB_EVERY_SECONDS = 5.0
"""Time between two questions to Slurm whether the job has ended."""


def log_file(run_dir: Path, rank: int | None) -> Path:
    """Of an actor rank, or the output of the job and its controller. ConfigError when it cannot be known."""
    if rank is not None:
        return run_dir / "logs" / f"actor_rank_{rank:05d}.log"
    newest = JobRecords(run_dir).newest()
    if newest is None:
        raise ConfigError(f"no job was submitted for {run_dir}; give a run folder of dapo-megatron submit.")
    return newest.log


def job_has_ended(run_dir: Path) -> bool:
    """Whether no more output can come: the newest job is over, or Slurm has forgotten it."""
    newest = JobRecords(run_dir).newest()
    job = scheduler.find_job(newest.job_id) if newest else None
    return job is None or job.ended


def follow(file: Path, ended: Callable[[], bool]) -> Iterator[bytes]:
    """What is in the file and what comes, until `ended` and all is read.

    A file that is not there yet is waited for; one that is replaced or cut, as each attempt does, is read from its beginning.
    """
    position, inode, next_question, over = 0, 0, 0.0, False
    while True:
        if not over and time.monotonic() >= next_question:
            over = ended()  # asked before reading: what was written before the end is read after it
            next_question = time.monotonic() + JOB_EVERY_SECONDS
        try:
            with file.open("rb") as opened:
                facts = os.fstat(opened.fileno())
                if facts.st_ino != inode or facts.st_size < position:
                    position, inode = 0, facts.st_ino
                opened.seek(position)
                while piece := opened.read(PIECE_BYTES):
                    position += len(piece)
                    yield piece
        except FileNotFoundError:
            pass
        if over:
            return
        time.sleep(POLL_SECONDS)
