"""Checkpoints that real megatron-core ranks wrote, under any layout: exported byte for byte, run by megatron-core again."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from checkpoint_tools.locate import locate
from checkpoint_tools.logits import compare_logits, logits_of, sample_sequences
from dapo_megatron.weights.families import megatron_arguments
from tests.distributed import programs
from tests.distributed.ranks import run_ranks
from tests.distributed.saves import save_weights
from tests.tiny_models import make_hf_model
from tests.tools import Tool

VOCAB_SIZE = 101


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Tool:
    return Tool(monkeypatch, capsys)


@pytest.mark.parametrize(
    ("family", "sizes", "layout", "options"),
    [
        ("qwen2", {}, {"tensor_parallel_size": 2}, {"stacked": True, "with_arguments": True}),
        ("llama3_tied", {}, {"pipeline_parallel_size": 2, "virtual_pipeline_size": 2}, {}),
        (
            "llama",
            {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 96},
            {"tensor_parallel_size": 2, "pad_query_groups": True},
            {"optimizer": True},
        ),
    ],
    ids=["qwen2_tp2_stacked", "llama3_tied_pp2_vpp2", "three_groups_on_tp2_with_optimizer"],
)
def test_what_ranks_saved_comes_out_as_the_model_they_loaded(
    tool: Tool, tmp_path: Path, family: str, sizes: dict[str, int], layout: dict[str, Any], options: dict[str, bool]
):
    hf_dir = make_hf_model(tmp_path / "hf", family, **sizes)
    checkpoint, out = tmp_path / "checkpoint", tmp_path / "out"
    if options.pop("with_arguments", False):
        arguments = megatron_arguments(json.loads((hf_dir / "config.json").read_text()))
        save = partial(save_weights, arguments=arguments, **options)
    else:
        save = partial(save_weights, **options)
    run_ranks(save, 2, programs.make_config(hf_dir, **layout), checkpoint)
    outcome = tool("megatron-to-hf", checkpoint, out, "--hf-config", hf_dir)
    assert outcome.code == 0, outcome.err
    found, wanted = load_file(out / "model.safetensors"), load_file(hf_dir / "model.safetensors")
    assert found.keys() == wanted.keys()
    assert all(found[name].equal(tensor) and found[name].dtype == tensor.dtype for name, tensor in wanted.items())
    assert tool("verify", checkpoint, hf_dir).code == 0
    if options.get("optimizer"):
        assert "left out: optimizer state" in outcome.out


def megatron_logits(rank: int, init_method: str, hf_dir: Path, checkpoint: Path) -> list[np.ndarray]:
    """It starts a world of its own."""
    return logits_of(locate(checkpoint), hf_dir, sample_sequences(VOCAB_SIZE))


@pytest.mark.parametrize("family", ["llama3_tied", "qwen3_moe", "deepseek_v3"])
def test_megatron_core_gives_the_logits_of_transformers_from_a_converted_checkpoint(tool: Tool, tmp_path: Path, family: str):
    right = make_hf_model(tmp_path / "right", family, vocab_size=VOCAB_SIZE)
    assert tool("hf-to-megatron", right, tmp_path / "megatron").code == 0
    (found,) = run_ranks(megatron_logits, 1, right, tmp_path / "megatron")
    comparison = compare_logits(logits_of(locate(right), right, sample_sequences(VOCAB_SIZE)), found)
    assert comparison.is_equal and comparison.num_positions == comparison.num_same_choice == 60, comparison
    weights = load_file(right / "model.safetensors")
    weights["model.layers.1.self_attn.o_proj.weight"][0, 0] += 0.1
    save_file(weights, right / "model.safetensors", metadata={"format": "pt"})
    comparison = compare_logits(logits_of(locate(right), right, sample_sequences(VOCAB_SIZE)), found)
    assert not comparison.is_equal, comparison
