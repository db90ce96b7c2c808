"""`compare-layouts` from the command line: real Ray, real ranks, a model of which only config.json exists."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dapo_megatron.launcher.recorded_batch import record
from dapo_megatron.types import OptimizerStepBatch, TrainBatch, TrainSample
from tests.e2e.runs import run
from tests.published_configs import QWEN3_8B, QWEN3_235B_A22B


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_8B))
    file = tmp_path / "run.yaml"
    file.write_text(f"model: {{path: {tmp_path}}}\ndata: {{path: unused}}\nrun: {{dir: {tmp_path / 'run'}}}\n")
    return file


def compare(config: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    done = run(config.parent, "compare-layouts", str(config), "--json", "--shrink", *arguments, seconds=200)
    assert done.returncode in (0, 1) and done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


@pytest.mark.timeout(240)
def test_tensor_and_pipeline_parallel_ranks_agree_with_experts_shared_out_and_not(config: Path):
    experts = QWEN3_235B_A22B | {"num_experts": 8, "num_experts_per_tok": 2}
    (config.parent / "config.json").write_text(json.dumps(experts))
    tensor_parallel = "actor.tensor_parallel_size=2,sequence_parallel=true,expert_parallel_size=2"
    code, report = compare(config, "--a", tensor_parallel, "--b", "actor.pipeline_parallel_size=2")
    assert code == 0 and report["agree"] and report["disagreements"] == []
    assert report["layouts"]["A"]["tensor_parallel_size"] == report["layouts"]["B"]["pipeline_parallel_size"] == 2
    assert len(report["updates"]) == 2
    assert all(side["grad_norm"] > 0 for update in report["updates"] for side in update.values())
    names = {parameter["name"] for parameter in report["parameters"]}
    assert len(names) == len(report["parameters"]) and "model.layers.1.mlp.experts.7.down_proj.weight" in names
    assert max(parameter["gradient"] for parameter in report["parameters"]) > 0, "the sums are in another order"


@pytest.mark.timeout(240)
def test_another_clip_ratio_on_a_recorded_batch_disagrees(config: Path, tmp_path: Path):
    rng = np.random.default_rng(0)
    samples = tuple(
        TrainSample(rng.integers(0, 151936, 9, np.int32), 3, np.full(6, -5.0, np.float32), advantage, 1.0, on_policy=False)
        for advantage in (1.0, -1.0, 0.5, -0.5)
    )
    record(TrainBatch((OptimizerStepBatch(((samples,),), 24),)), tmp_path, rollout_step=7)
    code, report = compare(config, "--b", "algo.clip_ratio_low=0.9,clip_ratio_high=9", "--batch", str(tmp_path))
    assert code == 1 and not report["agree"]
    assert report["updates"][0]["A"]["num_loss_tokens"] == report["updates"][0]["B"]["num_loss_tokens"] == 24
    assert any(text.startswith("gradient of ") for text in report["disagreements"])
