"""What is known of the jobs of a run without asking Slurm.

RUN/slurm/job.sbatch     the script, as submitted
RUN/slurm/config.json    all settings, as the job reads them
RUN/slurm/jobs           one line per job: its id, when it was submitted
RUN/slurm/history        one line per beginning and end of an attempt, written by the script
RUN/slurm/JOB.log        output of the script and of the run; attempts follow one another. Of an array: in the sweep's folder
RUN/slurm/cancelled      id of a job that must not start again
RUN/slurm/sweep.json     in the folder of a sweep: the names of its runs
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dapo_megatron.launcher.slurm.script import FOLDER, SCRIPT


@dataclass(frozen=True, slots=True)
class Submission:
    """One job of a run; `submitted` is local time."""

    job_id: str
    submitted: str
    folder: Path
    """Of the run, or of the sweep."""

    @property
    def log(self) -> Path:
        """Output of the script and of the run."""
        return self.folder / FOLDER / f"{self.job_id}.log"

    @property
    def signal_lead_seconds(self) -> int | None:
        """How long the run has to save, by the script; None when it does not say."""
        script = self.folder / SCRIPT
        said = re.search(r"^#SBATCH --signal=B:USR1@(\d+)$", script.read_text(), re.MULTILINE) if script.is_file() else None
        return int(said[1]) if said else None


class JobRecords:
    """Files of the jobs of one run."""

    def __init__(self, run_dir: Path):
        self.run_dir = run_dir
        self.folder = run_dir / FOLDER
        self.config_file = self.folder / "config.json"
        self.script_file = run_dir / SCRIPT
        self.history_file = self.folder / "history"
        self.cancelled_file = self.folder / "cancelled"
        self._jobs_file = self.folder / "jobs"
        self._sweep_file = self.folder / "sweep.json"

    def add(self, job_id: str) -> None:
        """Remember a job that is submitted now. The script adds one that was submitted without us."""
        with self._jobs_file.open("a") as file:
            file.write(f"{job_id} {time.strftime('%Y-%m-%d %H:%M:%S')}\n")

    def newest(self) -> Submission | None:
        """The job submitted last."""
        lines = self._jobs_file.read_text().splitlines() if self._jobs_file.is_file() else []
        if not lines:
            return None
        job_id, _, submitted = lines[-1].partition(" ")
        return Submission(job_id, submitted, self.run_dir.parent if "_" in job_id else self.run_dir)

    def last_words(self) -> str | None:
        """The last line of the history."""
        if not self.history_file.is_file():
            return None
        lines = self.history_file.read_text(errors="replace").splitlines()
        return lines[-1] if lines else None

    def write_sweep(self, names: Sequence[str]) -> None:
        """Make this the folder of a sweep over runs of these names."""
        self._sweep_file.write_text(json.dumps(list(names)) + "\n")

    def sweep(self) -> list[Path]:
        """The run folders of a sweep; empty for a run."""
        if not self._sweep_file.is_file():
            return []
        return [self.run_dir / name for name in json.loads(self._sweep_file.read_text())]
