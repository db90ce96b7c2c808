"""Run the tasks of a conversion into its output folder, skipping what an earlier run has done."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint_tools.errors import InterruptedWork
from checkpoint_tools.output_folder import OutputFolder
from checkpoint_tools.progress import progress_bar
from checkpoint_tools.worker_pool import MakeWorker, Pool, Task, peak_memory_bytes, run_tasks


@dataclass(frozen=True, slots=True)
class Finished:
    """`records` by task name; `num_kept` of them were found in order from an earlier run."""

    records: Mapping[str, Any]
    num_kept: int
    peak_memory_bytes: int
    """Of this process and its workers together, interpreters included."""


def run_conversion(what: str, folder: OutputFolder, pool: Pool, make_worker: MakeWorker, tasks: Sequence[Task]) -> Finished:
    """Do every task, recording each in the folder's journal as it is done, under a progress bar.

    InterruptedWork on ctrl-c, and errors as `run_tasks`.
    """
    claims = {task.name: folder.finished[task.name] for task in tasks if task.name in folder.finished}
    records: dict[str, Any] = {}
    num_kept = 0
    peaks = {}
    try:
        with progress_bar(what, sum(task.num_bytes for task in tasks)) as report:
            for done in run_tasks(pool, make_worker, tasks, claims, report):
                records[done.name] = done.record
                num_kept += done.was_kept
                peaks[done.process] = done.peak_memory_bytes
                if not done.was_kept:
                    folder.record(done.name, done.record)
    except KeyboardInterrupt:
        raise InterruptedWork(
            f"interrupted after {len(records)} of {len(tasks)} tensors; run the same command again to go on"
        ) from None
    peaks[os.getpid()] = peak_memory_bytes()
    return Finished(records, num_kept, sum(peaks.values()))


def presize(path: Path, num_bytes: int) -> None:
    """Create the file, or give it its full length, without writing: tasks fill their parts in any order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.truncate(num_bytes)
