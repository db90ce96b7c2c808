"""What is known of the jobs of a run without asking Slurm.

RUN/slurm/job.sbatch     the script, as submitted
RUN/slurm/config.json    all settings, as the job reads them
RUN/slurm/jobs.jsonl     one object per submission
RUN/slurm/history        one line per beginning and end of an attempt, written by the script
RUN/slurm/JOB.log        output of the script and of the run; attempts follow one another
RUN/slurm/cancelled      id of a job that must not start again
RUN/slurm/sweep.json     in the folder of a sweep: the names of its runs
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from dapo_megatron.launcher.slurm.script import FOLDER


@dataclass(frozen=True, slots=True)
class Submission:
    """One job of a run. `log` is where its output goes; `submitted` is local time."""

    job_id: str
    submitted: str
    log: Path


_SUBMISSION = TypeAdapter(Submission)


class JobRecords:
    """Files of the jobs of one run."""

    def __init__(self, run_dir: Path):
        self.run_dir = run_dir
        self.folder = run_dir / FOLDER
        self.config_file = self.folder / "config.json"
        self.script_file = self.folder / "job.sbatch"
        self.history_file = self.folder / "history"
        self.cancelled_file = self.folder / "cancelled"
        self._jobs_file = self.folder / "jobs.jsonl"
        self._sweep_file = self.folder / "sweep.json"

    def add(self, submission: Submission) -> None:
        """Remember a job."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._jobs_file.open("ab") as file:
            file.write(_SUBMISSION.dump_json(submission) + b"\n")

    def newest(self) -> Submission | None:
        """The job submitted last."""
        if not self._jobs_file.is_file():
            return None
        lines = self._jobs_file.read_bytes().splitlines()
        return _SUBMISSION.validate_json(lines[-1]) if lines else None

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
