"""Jobs whose run is played by a stand-in: see stand_in.sh."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from dapo_megatron.launcher.slurm.record import JobRecords
from dapo_megatron.launcher.slurm.submit import Request, submit
from tests.slurm.cluster import Cluster

STAND_IN = Path(__file__).with_name("stand_in.sh")


@dataclass(frozen=True)
class Run:
    """A submitted run. `said` is what submit printed."""

    folder: Path
    job: str
    said: str

    @property
    def history(self) -> str:
        return (self.folder / "slurm" / "history").read_text()

    @property
    def attempts(self) -> list[str]:
        file = self.folder / "attempts"
        return file.read_text().splitlines() if file.is_file() else []

    def environment(self, process: int) -> dict[str, str]:
        """Of a process of the last attempt."""
        items = (self.folder / f"environment.{process}").read_bytes().decode().split("\0")
        return dict(item.partition("=")[::2] for item in items if item)


@dataclass(frozen=True)
class Play:
    """Submits runs that do, attempt by attempt, what their words say."""

    folder: Path

    def __call__(self, words: str, *overrides: str, name: str = "run", array: tuple[str, ...] = ()) -> Run:
        """`name` is the run folder's."""
        run_dir = self.folder / name
        run_dir.mkdir()
        (run_dir / "play").write_text(words)
        settings = {
            "run.dir": str(run_dir),
            "model.path": "model",
            "data.path": "data",
            "checkpoint.every": 0,
            "slurm.gpus_per_node": 0,
            "slurm.exclusive": False,
            "slurm.time": 10,
            "slurm.python": str(STAND_IN),
        }
        given = [f"--{path}={json.dumps(value)}" for path, value in settings.items()]
        said = io.StringIO()
        submit(Request([], [*given, *overrides], array), lambda config: None, Console(file=said, width=400))
        submission = JobRecords(run_dir).newest()
        return Run(run_dir, submission.job_id if submission else said.getvalue().split()[1].rstrip(":"), said.getvalue())


def wait_for_file(slurm: Cluster, run: Run, name: str) -> None:
    """Until the stand-in has written it."""
    slurm.wait(run.job, until=lambda: (run.folder / name).exists())
