"""Legacy checkpoints of megatron-core's own ranks: resharded, they are what the ranks of the other layout hold, bit by bit."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import programs
from tests.distributed.legacy_saves import ITERATION, load_legacy, save_legacy
from tests.distributed.ranks import run_ranks
from tests.legacy import write_legacy
from tests.tiny_models import make_hf_model
from tests.tools import Tool

_OPTIONS = {
    "tensor_parallel_size": "--tensor",
    "pipeline_parallel_size": "--pipeline",
    "virtual_pipeline_size": "--virtual-pipeline",
    "expert_parallel_size": "--expert",
    "expert_tensor_parallel_size": "--expert-tensor",
}
WHOLE: dict[str, int] = {}
TP2 = {"tensor_parallel_size": 2}
TP4_PP2 = {"tensor_parallel_size": 4, "pipeline_parallel_size": 2}
PP2_VPP2 = {"pipeline_parallel_size": 2, "virtual_pipeline_size": 2}
TP2_PP2_VPP2 = TP2 | PP2_VPP2
UNEVEN = {"pipeline_parallel_size": 2, "num_layers_in_first_pipeline_stage": 1}
TP2_EP4 = {"tensor_parallel_size": 2, "expert_parallel_size": 4, "expert_tensor_parallel_size": 1, "num_ranks": 4}
TP2_PP2_EP2 = TP2 | {"pipeline_parallel_size": 2, "expert_parallel_size": 2, "expert_tensor_parallel_size": 2, "num_ranks": 8}
EP2_VPP2 = PP2_VPP2 | {"expert_parallel_size": 2, "num_ranks": 4}


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Tool:
    return Tool(monkeypatch, capsys)


@pytest.mark.parametrize(
    ("family", "layouts"),
    [
        ("qwen2", [WHOLE, TP2, TP4_PP2, UNEVEN]),
        ("llama", [TP2_PP2_VPP2, PP2_VPP2, TP4_PP2]),
        ("qwen3_moe_some_dense", [WHOLE, TP2_EP4, TP2_PP2_EP2]),
        ("deepseek_v3", [TP2_PP2_EP2, EP2_VPP2]),
    ],
)
def test_every_layout_comes_out_as_megatron_core_has_it(tool: Tool, tmp_path: Path, family: str, layouts: list[dict[str, int]]):
    hf_dir = make_hf_model(tmp_path / "hf", family)
    saved = [tmp_path / f"saved{number}" for number in range(len(layouts))]
    configs = [programs.make_config(hf_dir, **layout) for layout in layouts]
    run_ranks(save_legacy, 1, list(zip(configs, saved, strict=True)))
    for number, source in enumerate(saved):
        target = (number + 1) % len(layouts)
        out = tmp_path / f"out{number}"
        outcome = tool("reshard", source, out, *options_of(layouts[target]))
        assert outcome.code == 0, outcome.err
        assert_same_files(out, saved[target])
        outcome = tool("verify", out, hf_dir)
        assert outcome.code == 0 and "bit-exact" in outcome.out, outcome.out + outcome.err


def test_megatron_lm_loads_what_was_resharded(tool: Tool, tmp_path: Path):
    hf_dir = make_hf_model(tmp_path / "hf", "qwen3_moe")
    source = write_legacy(hf_dir, tmp_path / "source", make_vocab_size_divisible_by=1)
    layout = TP2_PP2_EP2 | {"virtual_pipeline_size": 2}
    assert tool("reshard", source, tmp_path / "out", *options_of(layout)).code == 0
    (num_compared,) = run_ranks(load_legacy, 1, programs.make_config(hf_dir, **layout), tmp_path / "out")
    assert num_compared > 8 * 2 * 8


def options_of(layout: dict[str, int]) -> list[object]:
    whole = {"tensor_parallel_size": 1, "pipeline_parallel_size": 1, "virtual_pipeline_size": 1, "expert_parallel_size": 1}
    words: list[object] = [word for key, size in (whole | layout).items() if key in _OPTIONS for word in (_OPTIONS[key], size)]
    if "num_layers_in_first_pipeline_stage" in layout:
        words += ["--layers-per-stage", "1,3"]
    if "expert_parallel_size" in layout and "expert_tensor_parallel_size" not in layout:
        words += ["--expert-tensor", 1]
    return words


def assert_same_files(out: Path, wanted: Path) -> None:
    """The same folders, models, names, dtypes and values."""
    assert (out / "latest_checkpointed_iteration.txt").read_text() == str(ITERATION)
    files = sorted(file.relative_to(wanted) for file in wanted.rglob("*.pt"))
    assert sorted(file.relative_to(out) for file in out.rglob("*.pt")) == files
    for file in files:
        expected = load(wanted / file, weights_only=False)
        found = load(out / file, weights_only=True)
        models = {key: value for key, value in expected.items() if key.startswith("model")}
        assert found.keys() == {"args", "checkpoint_version", "iteration", *models}
        for key, model in models.items():
            assert found[key].keys() == model.keys(), file
            for name, value in model.items():
                same = value is found[key][name] if value is None else same_bits(value, found[key][name])
                assert same, f"{file}: {name}"
        sizes = ("tensor", "pipeline", "virtual_pipeline", "expert")
        names = ["padded_vocab_size", "params_dtype", "data_path", "lr", *(f"{size}_model_parallel_size" for size in sizes)]
        assert [getattr(found["args"], name) for name in names] == [getattr(expected["args"], name) for name in names]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def load(file: Path, *, weights_only: bool) -> dict[str, Any]:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(file, weights_only=weights_only)
