"""verify: equal means bit for bit, and a difference is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny_models import make_hf_model
from tests.tools import Tool
from tests.torch_dist import mcore_tensors, save_state, write_torch_dist

NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Tool:
    return Tool(monkeypatch, capsys)


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf_model(tmp_path_factory.mktemp("hf") / "qwen2", "qwen2")


@pytest.fixture(scope="module")
def checkpoint(hf_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_torch_dist(hf_dir, tmp_path_factory.mktemp("megatron") / "stacked", stacked=True)


def changed(hf_dir: Path, target: Path, **tensors: torch.Tensor | None) -> Path:
    """A copy with other tensors; None: without it."""
    shutil.copytree(hf_dir, target)
    weights: dict[str, Any] = load_file(target / "model.safetensors") | tensors
    kept = {name: tensor.contiguous() for name, tensor in weights.items() if tensor is not None}
    save_file(kept, target / "model.safetensors", metadata={"format": "pt"})
    return target


def original(hf_dir: Path) -> torch.Tensor:
    return load_file(hf_dir / "model.safetensors")[NAME].clone()


def test_any_mix_of_formats_is_compared_and_the_count_of_tensors_is_said(
    tool: Tool, tmp_path: Path, hf_dir: Path, checkpoint: Path
):
    apart = write_torch_dist(hf_dir, tmp_path / "apart", extra={"optimizer.state.exp_avg.x": torch.zeros(3)})
    copy = changed(hf_dir, tmp_path / "copy")
    for a, b in ((hf_dir, checkpoint), (checkpoint, hf_dir), (hf_dir, copy)):
        outcome = tool("verify", a, b)
        assert outcome.code == 0
        assert "bit-exact: 50 of 50 tensors" in outcome.out
    outcome = tool("verify", apart, checkpoint, "--hf-config", hf_dir)
    assert outcome.code == 0 and "not compared: optimizer state (1 tensors)" in outcome.out
    assert tool("verify", apart, checkpoint).code == 2


def test_the_first_difference_has_its_index_and_both_values(tool: Tool, tmp_path: Path, hf_dir: Path, checkpoint: Path):
    tensor = original(hf_dir)
    tensor[3, 5] += 1
    tensor[90, 0] = 7.0
    outcome = tool("verify", checkpoint, changed(hf_dir, tmp_path / "changed", **{NAME: tensor}), "--max-memory", "4MiB")
    assert outcome.code == 1
    before = original(hf_dir)
    difference = max(1.0, 7.0 - before[90, 0].item())
    assert (
        f"{NAME} 2 elements differ, first at [3, 5]: {before[3, 5].item():.9g} in A, {tensor[3, 5].item():.9g} in B, "
        f"largest difference {difference:.3g}"
    ) in outcome.out
    assert "different: 49 of 50 tensors are bit-exact" in outcome.out


def test_a_tensor_larger_than_the_memory_is_compared_in_bands_and_the_index_counts_from_its_start(tool: Tool, tmp_path: Path):
    tensor = torch.arange(4_000_000, dtype=torch.float32).reshape(2000, 2000)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"model_type": "of no family"}')
        save_file({"x": tensor}, tmp_path / name / "model.safetensors")
        tensor[1500, 1999] = -1
    outcome = tool("verify", tmp_path / "a", tmp_path / "b", "--max-memory", "4MiB", "--workers", 1)
    assert "x 1 element differs, first at [1500, 1999]: 3001999 in A, -1 in B" in outcome.out


def test_tensors_of_one_side_only_and_other_shapes_are_named(tool: Tool, tmp_path: Path, hf_dir: Path):
    other = changed(hf_dir, tmp_path / "other", **{NAME: None, "extra": torch.zeros(2), "model.norm.weight": torch.zeros(63)})
    problems = json.loads(tool("verify", hf_dir, other, "--json").out)["problems"]
    assert problems[NAME] == f"is only in A, {hf_dir}"
    assert problems["extra"] == f"is only in B, {other}"
    assert problems["model.norm.weight"] == "has shape (64,) in A, (63,) in B"


def test_a_tied_head_that_only_one_side_stores_is_no_difference(tool: Tool, tmp_path: Path, hf_dir: Path, checkpoint: Path):
    embedding = load_file(hf_dir / "model.safetensors")["model.embed_tokens.weight"]
    with_head = changed(hf_dir, tmp_path / "head", **{"lm_head.weight": embedding.clone()})
    outcome = tool("verify", checkpoint, with_head)
    assert outcome.code == 0 and "not compared: lm_head.weight: tied to the embedding" in outcome.out


def test_other_dtypes_are_a_difference_that_is_explained(tool: Tool, tmp_path: Path, hf_dir: Path):
    in_bf16 = save_state({name: tensor.bfloat16() for name, tensor in mcore_tensors(hf_dir).items()}, tmp_path / "bf16")
    outcome = tool("verify", hf_dir, in_bf16, "--json")
    assert outcome.code == 1
    sentence = json.loads(outcome.out)["problems"][NAME]
    assert sentence.startswith("is F32 in A, BF16 in B: ") and sentence.endswith("the wider rounded to the narrower is equal")
    off = {name: (tensor * 1.1).bfloat16() for name, tensor in mcore_tensors(hf_dir).items()}
    sentence = json.loads(tool("verify", save_state(off, tmp_path / "off"), hf_dir, "--json").out)["problems"][NAME]
    assert sentence.startswith("is BF16 in A, F32 in B: ") and "is equal" not in sentence


def test_nan_and_signed_zero_are_compared_as_bits(tool: Tool, tmp_path: Path, hf_dir: Path):
    tensor = original(hf_dir)
    tensor[0, 0], tensor[0, 1] = torch.nan, 0.0
    a = changed(hf_dir, tmp_path / "a", **{NAME: tensor})
    assert tool("verify", a, changed(hf_dir, tmp_path / "b", **{NAME: tensor})).code == 0
    tensor[0, 1] = -0.0
    outcome = tool("verify", a, changed(hf_dir, tmp_path / "c", **{NAME: tensor}))
    assert outcome.code == 1 and "1 element differs, first at [0, 1]: 0 in A, -0 in B" in outcome.out


def test_what_was_changed_since_it_was_written_is_found_by_its_manifest(
    tool: Tool, tmp_path: Path, hf_dir: Path, checkpoint: Path
):
    out = tmp_path / "out"
    tool("megatron-to-hf", checkpoint, out, "--hf-config", hf_dir)
    outcome = tool("verify", hf_dir, out)
    assert "50 hashes agree with what was recorded when it was written" in outcome.out
    with (out / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    copy = changed(out, tmp_path / "copy")  # with its manifest
    problems = json.loads(tool("verify", out, copy, "--json").out)["problems"]
    assert len(problems) == 2 and all("is not what its manifest says was written" in text for text in problems.values())


def test_what_was_trained_and_saved_beside_a_converted_checkpoint_is_not_held_against_its_manifest(
    tool: Tool, tmp_path: Path, hf_dir: Path
):
    """Megatron-LM with the same --load and --save."""
    assert tool("hf-to-megatron", hf_dir, tmp_path / "megatron").code == 0
    trained = changed(hf_dir, tmp_path / "trained", **{NAME: original(hf_dir) * 2})
    write_torch_dist(trained, tmp_path / "megatron" / "iter_0000100")
    (tmp_path / "megatron" / "latest_checkpointed_iteration.txt").write_text("100")
    outcome = tool("verify", tmp_path / "megatron", trained)
    assert outcome.code == 0 and "step 100" in outcome.out and "hashes" not in outcome.out
    outcome = tool("verify", tmp_path / "megatron" / "release", hf_dir)
    assert outcome.code == 0 and "50 hashes agree" in outcome.out


def test_several_workers_find_the_same(tool: Tool, tmp_path: Path, hf_dir: Path, checkpoint: Path):
    tensor = original(hf_dir)
    tensor[3, 5] += 1
    other = changed(hf_dir, tmp_path / "other", **{NAME: tensor})
    one, two = (json.loads(tool("verify", checkpoint, other, "--json", "--workers", n).out) for n in (1, 2))
    assert one == two
    assert list(one["problems"]) == [NAME]


def test_block_scaled_fp8_is_compared_as_the_bf16_that_megatron_gets_and_comes_back_as_such(
    tool: Tool, tmp_path: Path, hf_dir: Path
):
    in_bf16 = {name: tensor.bfloat16() for name, tensor in load_file(hf_dir / "model.safetensors").items()}
    name = "model.layers.1.mlp.down_proj.weight"
    scaled = {name: (in_bf16[name].float() / 0.01).to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.full((1, 1), 0.01)}
    fp8 = changed(hf_dir, tmp_path / "fp8", **in_bf16 | scaled)
    config = json.loads((fp8 / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (fp8 / "config.json").write_text(json.dumps(config))
    assert tool("hf-to-megatron", fp8, tmp_path / "megatron").code == 0
    outcome = tool("verify", fp8, tmp_path / "megatron")
    assert outcome.code == 0 and "bit-exact: 50 of 50 tensors" in outcome.out
    assert tool("megatron-to-hf", tmp_path / "megatron", tmp_path / "out").code == 0
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    expected = (scaled[name].float() * 0.01).bfloat16()
    assert load_file(tmp_path / "out" / "model.safetensors")[name].equal(expected)
    outcome = tool("verify", fp8, changed(fp8, tmp_path / "copy"))
    assert outcome.code == 0 and "bit-exact: 51 of 51 tensors" in outcome.out
