"""How measured steps of a run correct the model: one factor a phase, and the lengths that were sampled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from dapo_megatron.layout.layout import Layout
from dapo_megatron.metrics.names import STEP_KEY
from dapo_megatron.metrics.writers import FILE_NAME as METRICS_FILE_NAME
from dapo_megatron.metrics.writers import read_metrics
from dapo_megatron.types import ConfigError

if TYPE_CHECKING:
    from dapo_megatron.layout.plan import PlanRequest

NUM_WARM_UP_STEPS = 1
"""First steps of a run that are left out: kernels are chosen and buffers grow in them."""
_PHASES = ("rollout", "train", "sync")


@dataclass(frozen=True, slots=True)
class Calibration:
    """Factors that predicted seconds of a phase are multiplied with: measured over predicted, medians over a run's steps."""

    source: str
    """The run folder."""
    num_steps: int
    """Steps that were measured."""
    rollout: float = 1.0
    train: float = 1.0
    """Old log-probs, forward, backward and optimizer."""
    sync: float = 1.0
    mean_response_tokens: float | None = None
    """As sampled; None: the run did not say."""
    over_sampling: float | None = None
    """Groups generated per group trained on."""

    def factor(self, phase: str) -> float:
        """Of a phase of `StepTime`; old log-probs are part of what a run measures as training."""
        return {"rollout": self.rollout, "log_probs": self.train, "train": self.train, "sync": self.sync}[phase]


def calibration_of(request: PlanRequest, layout: Layout, run_dir: Path) -> Calibration:
    """Compare the steps in `run_dir/metrics.jsonl` with what the model says of the run's own devices, workload and `layout`.

    Raises ConfigError when there are no steps after the first, or none with a time.
    """
    from dapo_megatron.layout.search import time_of

    rows = _rows(run_dir / METRICS_FILE_NAME)
    lengths = _median(rows, "rollout/response_length_tokens")
    over_sampling = _over_sampling(rows)
    workload = replace(
        request.workload,
        mean_response_tokens=request.workload.mean_response_tokens if lengths is None else lengths,
        over_sampling=request.workload.over_sampling if over_sampling is None else over_sampling,
        rollout_lag=0,  # a run measures generation whole, also where it runs beside training
    )
    predicted = time_of(replace(request, workload=workload, calibration=None), layout)
    phases = {
        "rollout": predicted.phase_seconds("rollout"),
        "train": predicted.phase_seconds("train") + predicted.phase_seconds("log_probs"),
        "sync": predicted.phase_seconds("sync"),
    }
    measured = {phase: _median(rows, f"time/{phase}_seconds") for phase in _PHASES}
    factors = {phase: seconds / phases[phase] for phase, seconds in measured.items() if seconds is not None and phases[phase] > 0}
    if not factors:
        raise ConfigError(f"{run_dir}/metrics.jsonl has no time/{'_seconds, time/'.join(_PHASES)}_seconds; give another run.")
    return Calibration(str(run_dir), len(rows), **factors, mean_response_tokens=lengths, over_sampling=over_sampling)


def calibrated(request: PlanRequest, calibration: Calibration) -> PlanRequest:
    """The request with the factors, and with the measured lengths where it is about the same limit and gives none itself."""
    workload = request.workload
    if workload.mean_response_tokens is None and calibration.mean_response_tokens is not None:
        mean = min(calibration.mean_response_tokens, float(workload.max_response_tokens))
        workload = replace(workload, mean_response_tokens=mean)
    if calibration.over_sampling is not None:
        workload = replace(workload, over_sampling=calibration.over_sampling)
    return replace(request, workload=workload, calibration=calibration)


def _rows(file: Path) -> list[Mapping[str, Any]]:
    """Steps after the first of the run, in order; of a step that was run again after a resume the last one."""
    if not file.is_file():
        raise ConfigError(f"{file.parent} holds no {file.name}; --calibrate takes the folder of a run.")
    steps = {row[STEP_KEY]: row for row in read_metrics(file)}
    rows: list[Mapping[str, Any]] = [row for step, row in sorted(steps.items()) if step > NUM_WARM_UP_STEPS]
    if not rows:
        raise ConfigError(
            f"{file} has {len(steps)} steps and must have more than {NUM_WARM_UP_STEPS}: the first is not measured; run another step."
        )
    return rows


def _median(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    values = [float(row[name]) for row in rows if row.get(name) is not None]
    return median(values) if values else None


def _over_sampling(rows: Sequence[Mapping[str, Any]]) -> float | None:
    generated = sum(row.get("rollout/num_groups_generated") or 0 for row in rows)
    kept = sum(row.get("rollout/num_groups_kept") or 0 for row in rows)
    return max(1.0, generated / kept) if kept else None
