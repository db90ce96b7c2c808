"""inspect: every format, from headers alone."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

from dapo_megatron.weights.file_digest import digest_file
from tests.tiny_models import make_hf_model
from tests.tools import Tool
from tests.torch_dist import save_state, write_torch_dist

NUM_PARAMETERS = 130_432


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Tool:
    return Tool(monkeypatch, capsys)


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf_model(tmp_path_factory.mktemp("hf") / "qwen2", "qwen2")


def test_an_hf_directory(tool: Tool, hf_dir: Path):
    report = json.loads(tool("inspect", hf_dir, "--json").out)
    assert (report["kind"], report["family"], report["step"]) == ("hf", "qwen2", None)
    assert (report["num_tensors"], report["num_parameters"], report["num_bytes"]) == (50, NUM_PARAMETERS, 4 * NUM_PARAMETERS)
    by_name = {tensor["name"]: tensor for tensor in report["tensors"]}
    assert by_name["model.layers.0.mlp.up_proj.weight"]["shape"] == [96, 64]
    assert by_name["model.layers.0.mlp.up_proj.weight"]["files"] == ["model.safetensors"]


def test_a_torch_dist_checkpoint_with_optimizer_state_step_and_layout(tool: Tool, tmp_path: Path, hf_dir: Path):
    moments = {"optimizer.state.exp_avg.decoder.final_layernorm.weight": torch.zeros(64)}
    layout = {"tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 2, "lr": 1.0}
    write_torch_dist(hf_dir, tmp_path / "iter_0000100", stacked=True, arguments=layout, extra=moments)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("100")
    report = json.loads(tool("inspect", tmp_path, "--json").out)
    assert (report["kind"], report["family"], report["step"]) == ("torch_dist", None, 100)
    assert (report["num_tensors"], report["num_parameters"]) == (9, NUM_PARAMETERS)
    assert (report["num_optimizer_tensors"], report["optimizer_bytes"]) == (1, 256)
    assert report["settings"] == {"tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 2}
    text = tool("inspect", tmp_path, "--filter", "*linear_qkv.weight").out
    assert "4 x 128 x 64" in text and "1 of 9 tensors, 32,768 elements" in text
    assert "saved under tensor_model_parallel_size 4, pipeline_model_parallel_size 2" in text
    assert "optimizer state: 1 tensors, 256 B" in text


def test_a_run_and_one_of_its_checkpoints(tool: Tool, tmp_path: Path, hf_dir: Path):
    step = tmp_path / "run" / "checkpoints" / "step_000050"
    write_torch_dist(hf_dir, step / "actor" / "weights")
    save_state({"optimizer.state.exp_avg.x": torch.zeros(5)}, step / "actor" / "optimizer")
    (tmp_path / "run" / "config.json").write_text(json.dumps({"config": {"model": {"path": str(hf_dir)}}}))
    files = {str(file.relative_to(step)): file for file in step.rglob("*") if file.is_file()}
    digests = {name: {"num_bytes": d.num_bytes, "xxh3": d.xxh3} for name, d in ((n, digest_file(f)) for n, f in files.items())}
    (step / "COMPLETE").write_text(json.dumps({"num_steps": 50, "files": digests, "weights_only": False}))
    for path in (tmp_path / "run", step):
        report = json.loads(tool("inspect", path, "--json").out)
        assert (report["kind"], report["family"], report["step"]) == ("torch_dist", "qwen2", 50)
        assert (report["num_parameters"], report["optimizer_bytes"]) == (NUM_PARAMETERS, 20)
    outcome = tool("verify", tmp_path / "run", hf_dir)
    assert outcome.code == 0 and "bit-exact: 50 of 50 tensors" in outcome.out
    assert tool("megatron-to-hf", tmp_path / "run", tmp_path / "out").code == 0
    (step / "controller.json").write_text(json.dumps({"identity": {"items": {"model": "0123456789abcdef"}}}))
    outcome = tool("megatron-to-hf", tmp_path / "run", tmp_path / "out2")
    assert outcome.code == 2 and "was trained with a config.json of hash 0123456789abcdef" in outcome.error


def test_a_file_of_a_run_that_is_not_what_was_saved_is_found(tool: Tool, tmp_path: Path, hf_dir: Path):
    step = tmp_path / "run" / "checkpoints" / "step_000050"
    write_torch_dist(hf_dir, step / "actor" / "weights")
    (tmp_path / "run" / "config.json").write_text(json.dumps({"config": {"model": {"path": str(hf_dir)}}}))
    name = "actor/weights/__0_0.distcp"
    digests = {name: {"num_bytes": (step / name).stat().st_size, "xxh3": "00"}}
    (step / "COMPLETE").write_text(json.dumps({"num_steps": 50, "files": digests, "weights_only": True}))
    outcome = tool("verify", step, hf_dir)
    assert outcome.code == 1
    assert "weights/__0_0.distcp in A is not what its marker says was written" in outcome.out


def test_legacy_files_of_every_rank_and_megatrons_arguments(tool: Tool, tmp_path: Path):
    for rank in (0, 1):
        folder = tmp_path / f"mp_rank_{rank:02d}"
        folder.mkdir()
        model = {
            "embedding.word_embeddings.weight": torch.zeros(50, 64, dtype=torch.bfloat16),
            "decoder.final_layernorm.weight": torch.zeros(64),
        }
        content = {
            "args": argparse.Namespace(tensor_model_parallel_size=2),
            "iteration": 7,
            "model": model,
            "optimizer": {"x": torch.zeros(9)},
        }
        torch.save(content, folder / "model_optim_rng.pt")
    report = json.loads(tool("inspect", tmp_path, "--json").out)
    assert (report["kind"], report["step"], report["settings"]) == ("legacy", 7, {"tensor_model_parallel_size": 2})
    assert report["num_parameters"] == 2 * (50 * 64 + 64)
    assert report["tensors"][0]["name"] == "mp_rank_00.model.embedding.word_embeddings.weight"
    assert report["tensors"][0]["dtype"] == "BF16"


def test_what_is_no_checkpoint_is_refused_in_one_line(tool: Tool, tmp_path: Path, hf_dir: Path):
    assert "does not exist" in tool("inspect", tmp_path / "nowhere").error
    assert "is a file" in tool("inspect", hf_dir / "config.json").error
    assert "is no checkpoint" in tool("inspect", tmp_path).error
    assert "has no tensor whose name fits 'qkv'; try '*qkv*'" in tool("inspect", hf_dir, "--filter", "qkv").error
