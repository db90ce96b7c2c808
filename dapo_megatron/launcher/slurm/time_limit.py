"""A run asks itself to save where it has measured that it takes longer than the `--signal` of its batch script allows for.

The script is written at submission, from what was measured until then: of a new run nothing, and it stays over all restarts.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from contextlib import AbstractContextManager, suppress
from datetime import datetime

from dapo_megatron.config.schema import Config
from dapo_megatron.launcher.run_folder import RunFolder
from dapo_megatron.launcher.slurm import scheduler
from dapo_megatron.launcher.slurm.lead import measured_lead_seconds
from dapo_megatron.launcher.watching import watching
from dapo_megatron.types import SchedulerError

POLL_SECONDS = 60.0


class TimeLimit:
    """Of a running job, as the run in it sees it."""

    def __init__(self, config: Config, job_id: str):
        self._config, self._job_id = config, job_id
        self._end: float | None = None

    def is_near(self, now: float) -> bool:
        """Whether, at `now` (seconds since 1970), no more time is left than the run has measured that it needs to save."""
        lead = measured_lead_seconds(self._config, RunFolder(self._config.run.dir).metrics_file)
        if lead is None:
            return False
        if self._end is None:
            self._ask()
        if self._end is not None and now >= self._end - lead:
            self._ask()  # somebody may have given the job more time
        return self._end is not None and now >= self._end - lead

    def _ask(self) -> None:
        with suppress(SchedulerError):  # the controller may be away, a container may not have Slurm's commands
            job = scheduler.find_job(self._job_id)
            if job is not None:
                self._end = datetime.fromisoformat(job.ends).timestamp() if job.ends is not None else math.inf


def asked_in_time(config: Config, job_id: str) -> AbstractContextManager[None]:
    """Meanwhile this process gets SIGUSR1 once the time limit is near, as it does from Slurm."""
    limit = TimeLimit(config, job_id)

    def watch(ended: threading.Event) -> None:
        while not ended.wait(POLL_SECONDS):
            if limit.is_near(time.time()):
                print("the time limit is as near as the longest step and save have taken: asked to save", flush=True)
                os.kill(os.getpid(), signal.SIGUSR1)
                return

    return watching("time-limit", watch)
