"""compare-layouts up to the ranks: what is asked, the shrunk model, the random batch, and what counts as a difference."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from dapo_megatron.actor.replayed import Replay, ReplayedUpdate, Tolerance, compare
from dapo_megatron.config.schema import Config
from dapo_megatron.launcher.compare_layouts import Request, compare_layouts, generated_batch, split_overrides
from dapo_megatron.models.shrink import shrunk_config, write_random_model
from dapo_megatron.types import CheckpointError, ConfigError
from dapo_megatron.weights.hf_files import HfFiles
from dapo_megatron.weights.plan import compile_mapping
from tests.published_configs import QWEN3_8B

TOLERANCE = Tolerance(direct=1e-5, after_adam=1e-2)
BEFORE = {"w": np.ones((2, 2), np.float32), "b": np.zeros(2, np.float32)}


def replay(**changes: Any) -> Replay:
    update = ReplayedUpdate(loss=-0.1, num_loss_tokens=10, grad_norm=2.0)
    gradients = {"w": np.array([[1.0, 2.0], [3.0, 4.0]], np.float32), "b": np.zeros(2, np.float32)}
    weights = {"w": BEFORE["w"] - 0.001, "b": BEFORE["b"]}
    return replace(Replay((update, update), gradients, weights), **changes)


def disagreements(other: Replay, tolerance: Tolerance = TOLERANCE) -> list[str]:
    return compare(replay(), other, BEFORE).disagreements(tolerance)


def test_equal_replays_agree():
    assert disagreements(replay()) == []


def test_every_quantity_outside_its_tolerance_is_named():
    first, second = replay().updates
    assert disagreements(replay(updates=(replace(first, num_loss_tokens=9), second))) == [
        "update 1: 10 trained tokens in A, 9 in B"
    ]
    assert "update 1: loss -0.1 in A, -0.1001 in B" in disagreements(replay(updates=(replace(first, loss=-0.1001), second)))[0]
    assert "update 1: gradient norm" in disagreements(replay(updates=(replace(first, grad_norm=2.001), second)))[0]
    worse = replay(gradients=replay().gradients | {"w": np.array([[1.0, 2.0], [3.0, 4.001]], np.float32)})
    assert "gradient of 1 of 2 parameters, w worst (1.8e-04 apart)" in disagreements(worse)[0]
    moved = replay(weights=replay().weights | {"b": np.full(2, 1e-3, np.float32)})
    assert "weight change of 1 of 2 parameters, b worst (1.0e+00 apart)" in disagreements(moved)[0]


def test_what_adam_amplifies_has_a_wider_tolerance():
    first, second = replay().updates
    later = replay(
        updates=(first, replace(second, loss=-0.1001, grad_norm=2.001)),
        weights=replay().weights | {"w": BEFORE["w"] - np.float32(0.001001)},
    )
    assert disagreements(later) == []
    assert len(disagreements(later, Tolerance(1e-5, 1e-5))) == 3


def test_nan_is_a_disagreement_and_the_worst():
    broken = replay(gradients={"w": np.full((2, 2), 9.0, np.float32), "b": np.array([np.nan, 0], np.float32)})
    comparison = compare(replay(), broken, BEFORE)
    assert [tensor.name for tensor in comparison.tensors] == ["b", "w"]
    assert "gradient of 2 of 2 parameters, b worst (nan apart)" in comparison.disagreements(TOLERANCE)[0]


def test_overrides_may_be_repeated_or_joined_by_commas():
    assert split_overrides(["actor.tensor_parallel_size=2,sequence_parallel=true", "--model.dtype=bf16"]) == [
        "--actor.tensor_parallel_size=2",
        "--actor.sequence_parallel=true",
        "--model.dtype=bf16",
    ]
    assert split_overrides(["actor.optimizer={lr: 1e-3, eps: 1e-6},seed=1"]) == [
        "--actor.optimizer={lr: 1e-3, eps: 1e-6}",
        "--seed=1",
    ]


def test_a_bare_name_of_an_override_is_the_actors():
    assert split_overrides(["tensor_parallel_size=2,seed=1,optimizer={lr: 1}"]) == [
        "--actor.tensor_parallel_size=2",
        "--seed=1",
        "--actor.optimizer={lr: 1}",
    ]


def test_a_shrunk_model_keeps_what_layouts_divide():
    small = shrunk_config(QWEN3_8B, num_layers=4, tensor_parallel_size=8)
    kept = ("model_type", "num_attention_heads", "num_key_value_heads", "rope_theta")
    assert {name: small[name] for name in kept} == {name: QWEN3_8B[name] for name in kept}
    assert small["num_hidden_layers"] == 4 and small["intermediate_size"] % 8 == 0
    assert shrunk_config({**QWEN3_8B, "vocab_size": 151937}, num_layers=4, tensor_parallel_size=8)["vocab_size"] % 8 == 1
    assert sum(np.prod(shape) for shape in compile_mapping(small).hf_tensors.values()) < 500_000


def test_a_random_model_is_a_complete_hf_directory(tmp_path: Path):
    small = shrunk_config(QWEN3_8B, num_layers=2, tensor_parallel_size=2)
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        write_random_model(small, tmp_path / name, seed)
    one, again, other = (HfFiles(tmp_path / name) for name in ("one", "again", "other"))
    assert json.loads((tmp_path / "one" / "config.json").read_text()) == small
    assert one.check(compile_mapping(small)) == {}
    norm = "model.layers.1.self_attn.q_norm.weight"
    assert one.read(norm).equal(again.read(norm)) and not one.read(norm).equal(other.read(norm))
    assert one.read(norm).std() > 0.01


def test_a_generated_batch_has_both_kinds_of_samples_and_follows_the_seed():
    def batch(seed: int) -> Any:
        config = Config.model_validate({"model": {"path": "m"}, "data": {"path": "d"}, "run": {"seed": seed}})
        return generated_batch(100, num_updates=3, num_samples=8, config=config)

    assert batch(0) == batch(0) != batch(1)
    assert batch(0).rollout_step == 21, "past the 20 steps of warm-up"
    assert [len(step) for step in batch(0).optimizer_steps] == [8, 8, 8]
    samples = [sample for step in batch(0).optimizer_steps for sample in step]
    assert {sample.on_policy for sample in samples} == {True, False}
    assert {sample.advantage > 0 for sample in samples} == {True, False}
    assert all(min(sample.token_ids) >= 0 and max(sample.token_ids) < 100 for sample in samples)
    assert all(max(sample.rollout_log_probs) <= 0 for sample in samples)


@pytest.fixture
def request_for(tmp_path: Path) -> Request:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(QWEN3_8B))
    file = tmp_path / "run.yaml"
    file.write_text(f"model: {{path: {tmp_path / 'model'}}}\ndata: {{path: d}}\nrun: {{dir: {tmp_path / 'run'}}}\n")
    return Request(
        files=[file], overrides=[], a=[], b=[], num_ranks=None, batch=None, shrink=True, num_updates=1, num_samples=4,
        tolerance=None, as_json=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"a": ["actor.tensor_parallel_size=3"]}, "layout A: actor.tensor_parallel_size (3) must divide"),
        (
            {"b": ["actor.pipeline_parallel_size=5"]},
            "layout B: actor.pipeline_parallel_size (5) must divide num_hidden_layers (36)",
        ),
        ({"num_ranks": 3, "b": ["actor.tensor_parallel_size=2"]}, "layout B: actor.num_ranks (3) must be a multiple"),
        ({"b": ["actor.tensor_parallel=2"]}, "not a configuration key"),
        ({"b": ["model.path=elsewhere"]}, "model.path must be the same on both sides"),
    ],
)
def test_a_layout_that_cannot_run_is_refused_before_anything_starts(request_for: Request, changes: dict, words: str):
    with pytest.raises(ConfigError) as error:
        compare_layouts(replace(request_for, **changes), Console())
    assert words in str(error.value)


def test_a_batch_that_was_not_recorded_is_refused(request_for: Request, tmp_path: Path):
    with pytest.raises(CheckpointError, match="record_batch_of_step"):
        compare_layouts(replace(request_for, batch=tmp_path), Console())
