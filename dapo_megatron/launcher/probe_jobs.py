"""A probe on a cluster: each layout is a short run of its own, all of them an array of Slurm, ranked when they have ended."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table

from dapo_megatron.config.load import load_config
from dapo_megatron.config.schema import Config
from dapo_megatron.launcher.probe import PlannedLayout
from dapo_megatron.launcher.slurm.record import JobRecords
from dapo_megatron.launcher.slurm.submit import Request, submit
from dapo_megatron.launcher.slurm.sweep import Element
from dapo_megatron.layout.report import say
from dapo_megatron.metrics.writers import FILE_NAME, read_metrics
from dapo_megatron.types import ConfigError

NUM_ROLLOUT_STEPS = 2
"""Of each run; the last one is measured."""
NUM_UPDATES = 2
"""Optimizer steps of each rollout step, of their real size."""
FOLDER = "probe"


@dataclass(frozen=True, slots=True)
class RunOfLayout:
    """What a short run measured, per rollout step of NUM_UPDATES optimizer steps."""

    name: str
    train_seconds: float
    rollout_seconds: float
    step_seconds: float
    num_steps: int


def submit_probe(
    files: Sequence[Path],
    overrides: Sequence[str],
    layouts: Sequence[PlannedLayout],
    check: Callable[[Config], object],
    console: Console,
    *,
    dry_run: bool,
) -> Path | None:
    """One array with a run for each layout, in RUN/probe; None for a dry run, which prints the batch script."""
    config = load_config(files, overrides)
    elements = [
        Element(f"{number}_{_as_folder(layout.name)}", tuple(layout.overrides)) for number, layout in enumerate(layouts, 1)
    ]
    request = Request(files, [*overrides, *_short(config)], elements=elements, dry_run=dry_run)
    folder = submit(request, check, console)
    if folder is not None:
        say(console, f"when the runs have ended: dapo-megatron probe {folder}")
    return folder


def is_probe(path: Path) -> bool:
    """Whether a folder is that of such an array."""
    return bool(JobRecords(path).sweep())


def rank_runs(folder: Path, console: Console, *, as_json: bool) -> int:
    """The layouts of an array by the training time of their last rollout step; 1 when a run has none to show."""
    runs = JobRecords(folder).sweep()
    rows = {run: list(read_metrics(run / FILE_NAME)) for run in runs}
    found = sorted(
        (_measured(run, rows[run]) for run in runs if rows[run]), key=lambda run: (run.train_seconds, run.step_seconds)
    )
    missing = [run for run in runs if len(rows[run]) < NUM_ROLLOUT_STEPS]
    if as_json:
        console.print_json(json.dumps({"layouts": [asdict(run) for run in found], "unfinished": [run.name for run in missing]}))
    else:
        numbers = ("training s", "rollout s", "step s")
        table = Table("", "layout", *(Column(name, justify="right") for name in numbers), box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for place, run in enumerate(found, 1):
            seconds = (run.train_seconds, run.rollout_seconds, run.step_seconds)
            table.add_row(str(place), run.name, *(f"{value:.1f}" for value in seconds))
        console.print(table)
        for path in missing:
            say(
                console,
                f"{path.name}: {len(rows[path])} of {NUM_ROLLOUT_STEPS} steps; dapo-megatron status {path}",
                style="yellow",
            )
    return 1 if missing else 0


def _short(config: Config) -> list[str]:
    """Two rollout steps of a few optimizer steps, each of its real size; nothing is saved, dropped or evaluated."""
    train = config.train
    updates = min(NUM_UPDATES, train.num_updates_per_rollout)
    prompts = max(updates, math.ceil(train.num_prompts_per_step * updates / train.num_updates_per_rollout))
    settings = {
        "run.dir": str(config.run.dir / FOLDER),
        "run.max_restarts": 0,
        "slurm.max_restarts": 0,
        "train.num_rollout_steps": NUM_ROLLOUT_STEPS,
        "train.num_updates_per_rollout": updates,
        "train.num_prompts_per_step": prompts,
        "algo.dynamic_sampling": False,
        "algo.accuracy_min": 0,
        "algo.accuracy_max": 1,
        "eval.path": None,
        "checkpoint.every": 0,
        "checkpoint.load": None,
    }
    return [f"--{path}={json.dumps(value)}" for path, value in settings.items()]


def _measured(run: Path, rows: Sequence[dict]) -> RunOfLayout:
    last = rows[-1]
    try:
        train, rollout, step = (float(last[f"time/{phase}_seconds"]) for phase in ("train", "rollout", "step"))
    except KeyError as error:
        raise ConfigError(
            f"{run / FILE_NAME} has no {error} in its last row; the run trained on nothing, look at its log."
        ) from None
    return RunOfLayout(run.name, train, rollout, step, len(rows))


def _as_folder(name: str) -> str:
    """In letters that no shell, file system or Slurm minds."""
    return re.sub(r"[^A-Za-z0-9_.+-]+", "_", name)[:60].strip("_")
