"""What may change between a checkpoint and the run that goes on from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dapo_megatron.config.schema import Config
from dapo_megatron.launcher.identity import RunIdentity, differences, identity_of, require_same
from dapo_megatron.types import ConfigError


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"num_hidden_layers": 2}))
    return tmp_path / "model"


def identity(model: Path, fingerprint: str = "f0", **sections: Any) -> RunIdentity:
    return identity_of(Config.model_validate({"model": {"path": str(model)}, "data": {"path": "x"}, **sections}), fingerprint)


def names(before: RunIdentity, now: RunIdentity, *allowed: str) -> list[str]:
    return [item.name for item in differences(before, now, allowed)]


def test_what_shapes_the_numbers_is_named(model: Path):
    before = identity(model)
    assert names(before, identity(model)) == []
    changed = identity(model, actor={"optimizer": {"lr": 0.5}, "tensor_parallel_size": 2}, run={"seed": 3})
    assert names(before, changed) == ["actor.optimizer.lr", "actor.tensor_parallel_size", "run.seed"]


def test_length_of_the_run_saving_and_metrics_may_change(model: Path):
    free = {"train": {"num_rollout_steps": 7}, "checkpoint": {"every": 3}, "metrics": {"tensorboard": False}, "run": {"dir": "y"}}
    assert names(identity(model), identity(model, **free)) == []


def test_data_and_model_are_compared_by_what_they_hold(model: Path):
    before = identity(model)
    assert names(before, identity(model, fingerprint="f1")) == ["data"]
    (model / "config.json").write_text(json.dumps({"num_hidden_layers": 4}))
    assert names(before, identity(model)) == ["model"]


def test_code_and_versions_are_part_of_it(model: Path):
    now = identity(model)
    before = RunIdentity(now.items | {"code": "other", "versions.torch": "2.0.0"})
    assert names(before, now) == ["code", "versions.torch"]
    assert names(before, now, "code", "versions") == []


def test_a_reward_function_counts_by_its_source(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_reward.py").write_text("def score(response, answer): return 1.0\n")
    custom = {"reward": {"type": "custom", "function": "my_reward:score"}}
    before = identity(model, **custom)
    (tmp_path / "my_reward.py").write_text("def score(response, answer): return 0.0\n")
    assert names(before, identity(model, **custom)) == ["code.reward"]


def test_a_change_is_refused_in_words_unless_it_is_allowed(model: Path):
    before, now = identity(model), identity(model, run={"seed": 3}, actor={"optimizer": {"lr": 0.5}})
    with pytest.raises(ConfigError) as caught:
        require_same(before, now, ("actor",), Path("run/checkpoints/step_000001"))
    (problem,) = caught.value.problems
    assert problem.startswith("run.seed is 3, but was 0 in run/checkpoints/step_000001")
    assert "--allow-changed run.seed" in problem
    require_same(before, now, ("run.seed", "actor"), Path("unused"))
