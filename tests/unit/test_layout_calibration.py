from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dapo_megatron.layout.calibration import Calibration, calibrated, calibration_of
from dapo_megatron.layout.hardware import gpu_named
from dapo_megatron.layout.layout import EngineLayout, Layout
from dapo_megatron.layout.model_shape import GroupedQueryAttention, ModelShape
from dapo_megatron.layout.plan import PlanRequest
from dapo_megatron.layout.search import time_of
from dapo_megatron.layout.workload import Workload
from dapo_megatron.types import ConfigError

MODEL = ModelShape(28, 3584, 18944, GroupedQueryAttention(28, 4, 128), None, (False,) * 28, 152064, tied=False)
REQUEST = PlanRequest("model", MODEL, Workload(max_response_tokens=8192, mean_response_tokens=2000), gpu_named("h100-80"), 8)
LAYOUT = Layout(tensor_parallel_size=4, data_parallel_size=2, sequence_parallel=True, engine=EngineLayout(2, 4, 0.5))


def row(step: int, factor: float, **changes: Any) -> dict[str, Any]:
    """Metrics of a step that takes `factor` times what is predicted, except the sync, which takes as long."""
    predicted = time_of(replace(REQUEST, workload=replace(REQUEST.workload, over_sampling=1.25)), LAYOUT)
    return {
        "rollout_step": step,
        "time/rollout_seconds": factor * predicted.phase_seconds("rollout"),
        "time/train_seconds": factor * (predicted.phase_seconds("train") + predicted.phase_seconds("log_probs")),
        "time/sync_seconds": predicted.phase_seconds("sync"),
        "rollout/response_length_tokens": 2000.0,
        "rollout/num_groups_generated": 80,
        "rollout/num_groups_kept": 64,
        **changes,
    }


@pytest.fixture
def run_dir(tmp_path: Path):
    def write(*rows: dict[str, Any]) -> Path:
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
        return tmp_path

    return write


def test_factors_are_medians_of_measured_over_predicted_without_the_first_step(run_dir):
    found = calibration_of(REQUEST, LAYOUT, run_dir(row(1, 9.0), row(2, 1.4), row(3, 1.5), row(4, 3.0)))
    assert (found.rollout, found.train, found.sync) == pytest.approx((1.5, 1.5, 1.0))
    assert found.num_steps == 3 and found.mean_response_tokens == 2000 and found.over_sampling == pytest.approx(1.25)


def test_step_that_was_run_again_counts_once(run_dir):
    found = calibration_of(REQUEST, LAYOUT, run_dir(row(1, 1.0), row(2, 5.0), row(1, 1.0), row(2, 2.0)))
    assert found.num_steps == 1 and found.train == pytest.approx(2.0)


def test_measured_lengths_take_the_place_of_assumed_ones(run_dir):
    found = Calibration("run", 2, train=1.2, mean_response_tokens=900.0, over_sampling=1.25)
    unknown = replace(REQUEST, workload=replace(REQUEST.workload, mean_response_tokens=None))
    assert calibrated(unknown, found).workload.response_tokens == 900
    assert calibrated(REQUEST, found).workload.response_tokens == 2000
    assert calibrated(REQUEST, found).workload.over_sampling == 1.25 and calibrated(REQUEST, found).calibration == found


def test_prediction_is_of_the_measured_lengths(run_dir):
    longer = row(2, 1.0, **{"rollout/response_length_tokens": 4000.0})
    assert calibration_of(REQUEST, LAYOUT, run_dir(row(1, 1.0), longer)).train < 0.7


@pytest.mark.parametrize(
    "rows, words", [([], "has 0 steps"), ([1], "has 1 steps and must have more than 1"), (None, "holds no metrics.jsonl")]
)
def test_run_without_measured_steps_is_refused(run_dir, tmp_path: Path, rows: list[int] | None, words: str):
    folder = tmp_path / "other" if rows is None else run_dir(*(row(step, 1.0) for step in rows))
    with pytest.raises(ConfigError, match=words):
        calibration_of(REQUEST, LAYOUT, folder)


def test_steps_without_times_are_refused(run_dir):
    with pytest.raises(ConfigError, match=r"no time/rollout_seconds, time/train_seconds, time/sync_seconds"):
        calibration_of(REQUEST, LAYOUT, run_dir(row(1, 1.0), {"rollout_step": 2}))
