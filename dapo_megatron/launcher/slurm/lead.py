"""How long before the time limit a run must be asked to save, from the times that it has measured."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from dapo_megatron.config.schema import Config
from dapo_megatron.config.slurm_text import seconds_of

UNMEASURED_SECONDS = 600
"""For a run that has no metrics yet."""
MARGIN = 1.5
MOST_SECONDS = 65535
"""What `sbatch --signal` takes."""
SLURM_SECONDS = 60
"""Slurm looks at its time limits every 30 seconds."""
NUM_ROWS = 200
"""Of the latest rollout steps."""
TO_THE_END = ("time/train_seconds", "time/sync_seconds", "time/save_seconds")
"""Phases that are finished when a run is asked to end; the others are dropped."""


def signal_lead_seconds(config: Config, metrics_file: Path) -> int:
    """`slurm.signal_lead_seconds`, or the longest way from a request to a complete checkpoint; at most half of the time limit."""
    lead = config.slurm.signal_lead_seconds
    if lead is not None:
        return lead
    return measured_lead_seconds(config, metrics_file) or _bounded(UNMEASURED_SECONDS, config)


def measured_lead_seconds(config: Config, metrics_file: Path) -> int | None:
    """None for a run that has no metrics yet, and where `slurm.signal_lead_seconds` decides."""
    rows = _rows(metrics_file) if config.slurm.signal_lead_seconds is None else []
    return _bounded(_longest(rows, config.train.rollout_lag == 1), config) if rows else None


def _bounded(seconds: int, config: Config) -> int:
    limit = seconds_of(config.slurm.time)
    return min(seconds, limit // 2 if limit else MOST_SECONDS, MOST_SECONDS)


def _longest(rows: list[Mapping[str, float]], samples_ahead: bool) -> int:
    phases = (*TO_THE_END, "time/rollout_seconds") if samples_ahead else TO_THE_END
    step = sum(max(row.get(phase, 0.0) for row in rows) for phase in phases)
    write = max(row.get("checkpoint/write_seconds", 0.0) for row in rows)
    if not write:
        return max(UNMEASURED_SECONDS, math.ceil(MARGIN * step) + SLURM_SECONDS)
    return math.ceil(MARGIN * (step + write)) + SLURM_SECONDS


def _rows(metrics_file: Path) -> list[Mapping[str, float]]:
    if not metrics_file.is_file():
        return []
    lines = metrics_file.read_text().splitlines()[-NUM_ROWS:]
    return [json.loads(line) for line in lines if line.endswith("}")]  # the last one may be half written
