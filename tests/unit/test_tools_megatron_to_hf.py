"""From torch_dist to Hugging Face: the same bytes, and refusals in one line."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from checkpoint_tools.torch_dist import TorchDistReader
from dapo_megatron.weights.families import megatron_arguments
from tests.tiny_models import FAMILIES, MOE_FAMILIES, make_hf_model
from tests.tools import Tool
from tests.torch_dist import mcore_tensors, save_state, write_torch_dist

EQUAL_LAYERS = ("qwen3_moe", "mixtral")
"""Families with experts in every layer: Megatron-LM stacks them."""


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Tool:
    return Tool(monkeypatch, capsys)


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen2: bias, tied; with the files that lie beside weights."""
    directory = make_hf_model(tmp_path_factory.mktemp("hf") / "qwen2", "qwen2")
    (directory / "tokenizer.json").write_text("{}")
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    return directory


@pytest.fixture(scope="module")
def checkpoint(hf_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_torch_dist(hf_dir, tmp_path_factory.mktemp("megatron") / "iter_0000100", arguments=arguments_of(hf_dir))


def arguments_of(hf_dir: Path) -> dict[str, Any]:
    return megatron_arguments(json.loads((hf_dir / "config.json").read_text()))


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same_model(found: Path, wanted: Path) -> None:
    a, b = weights(found), weights(wanted)
    assert a.keys() == b.keys()
    for name, tensor in b.items():
        assert a[name].dtype == tensor.dtype, name
        assert a[name].equal(tensor), name


@pytest.mark.parametrize(
    ("family", "stacked"),
    [(family, False) for family in (*FAMILIES, *MOE_FAMILIES)] + [(family, True) for family in (*FAMILIES, *EQUAL_LAYERS)],
)
def test_every_family_comes_back_byte_for_byte_and_loads_strictly(tool: Tool, tmp_path: Path, family: str, stacked: bool):
    hf_dir = make_hf_model(tmp_path / "hf", family)
    checkpoint = write_torch_dist(hf_dir, tmp_path / "megatron", stacked=stacked, arguments=arguments_of(hf_dir))
    assert tool("megatron-to-hf", checkpoint, tmp_path / "out", "--hf-config", hf_dir).code == 0
    assert_same_model(tmp_path / "out", hf_dir)
    _, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading.values()), loading


def test_what_megatron_core_keeps_in_fp32_comes_back_in_the_dtype_that_the_model_had(tool: Tool, tmp_path: Path):
    """The bias of DeepSeek's router."""
    hf_dir, name = make_hf_model(tmp_path / "hf", "deepseek_v3"), "model.layers.2.mlp.gate.e_score_correction_bias"
    in_bf16 = {key: tensor.bfloat16() for key, tensor in weights(hf_dir).items()}
    save_file(in_bf16, hf_dir / "model.safetensors", metadata={"format": "pt"})
    assert tool("hf-to-megatron", hf_dir, tmp_path / "megatron").code == 0
    kept = TorchDistReader(tmp_path / "megatron" / "release").tensors["decoder.layers.2.mlp.router.expert_bias"]
    assert kept.dtype == "F32" and in_bf16[name].any()
    assert tool("verify", tmp_path / "megatron", hf_dir).code == 0
    assert tool("megatron-to-hf", tmp_path / "megatron", tmp_path / "out").code == 0
    assert_same_model(tmp_path / "out", hf_dir)


def test_the_directory_has_shards_an_index_and_all_files_beside_the_weights(
    tool: Tool, tmp_path: Path, hf_dir: Path, checkpoint: Path
):
    out = tmp_path / "out"
    options = ("--hf-config", hf_dir, "--shard-size", "100kB", "--workers", 1, "--json")
    summary = json.loads(tool("megatron-to-hf", checkpoint, out, *options).out)
    assert_same_model(out, hf_dir)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(summary["files"]) == {file.name for file in out.glob("*.safetensors")}
    assert all(file.stat().st_size < 110_000 for file in out.glob("*.safetensors"))
    for name in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (hf_dir / name).read_bytes()
    provenance = json.loads((out / "provenance.json").read_text())
    assert (provenance["source"], provenance["step"], provenance["family"]) == (str(checkpoint), 100, "qwen2")


def test_padded_vocabulary_and_query_groups_are_cut_and_optimizer_state_is_left_out(tool: Tool, tmp_path: Path):
    hf_dir = make_hf_model(tmp_path / "hf", "llama", num_attention_heads=6, num_key_value_heads=3, hidden_size=96)
    whole = mcore_tensors(hf_dir)
    qkv, proj = (f"decoder.layers.0.self_attention.linear_{name}.weight" for name in ("qkv", "proj"))
    padded = {
        "embedding.word_embeddings.weight": torch.cat([whole["embedding.word_embeddings.weight"], torch.randn(27, 96)]),
        qkv: torch.cat([whole[qkv], torch.zeros(64, 96)]),
        proj: torch.cat([whole[proj], torch.zeros(96, 32)], dim=1),
    }
    optimizer = {"optimizer.state.exp_avg.decoder.final_layernorm.weight": torch.zeros(96)}
    checkpoint = write_torch_dist(hf_dir, tmp_path / "megatron", extra=padded | optimizer)
    outcome = tool("megatron-to-hf", checkpoint, tmp_path / "out", "--hf-config", hf_dir)
    assert_same_model(tmp_path / "out", hf_dir)
    assert "left out: optimizer state (1 tensors)" in outcome.out
    assert f"cut: {27 * 96:,} padding elements of embedding.word_embeddings.weight" in outcome.out
    padded[qkv][-1, -1] = 1e-3
    trained = write_torch_dist(hf_dir, tmp_path / "trained", extra=padded)
    outcome = tool("megatron-to-hf", trained, tmp_path / "out2", "--hf-config", hf_dir)
    assert outcome.code == 2
    assert f"the padding of {qkv} beyond the query groups of config.json is not zero" in outcome.error


def test_a_checkpoint_in_another_dtype_says_so_in_config_json(tool: Tool, tmp_path: Path, hf_dir: Path):
    in_bf16 = {name: tensor.bfloat16() for name, tensor in mcore_tensors(hf_dir).items()}
    checkpoint = save_state(in_bf16, tmp_path / "megatron")
    assert (
        "config.json: dtype is 'bfloat16' now" in tool("megatron-to-hf", checkpoint, tmp_path / "out", "--hf-config", hf_dir).out
    )
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_chunks_whose_elements_lie_in_another_order_are_read_right(tool: Tool, tmp_path: Path, hf_dir: Path):
    name = "decoder.layers.1.mlp.linear_fc2.weight"
    transposed = mcore_tensors(hf_dir)[name].t().contiguous().t()
    assert not transposed.is_contiguous()
    checkpoint = write_torch_dist(hf_dir, tmp_path / "megatron", extra={name: transposed})
    tool("megatron-to-hf", checkpoint, tmp_path / "out", "--hf-config", hf_dir)
    assert_same_model(tmp_path / "out", hf_dir)


def test_a_killed_export_goes_on_and_checks_what_it_finds(
    tool: Tool, tmp_path: Path, hf_dir: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
):
    from checkpoint_tools.export_worker import ExportWorker

    work, done = ExportWorker.work, []

    def work_until_killed(self: ExportWorker, task: Any, report: Any) -> str:
        if len(done) == 20:
            raise KeyboardInterrupt
        done.append(task)
        return work(self, task, report)

    out, options = tmp_path / "out", ("--hf-config", hf_dir, "--json", "--workers", 1)
    with monkeypatch.context() as patch:
        patch.setattr(ExportWorker, "work", work_until_killed)
        assert tool("megatron-to-hf", checkpoint, out, *options).code == 130
    assert not out.exists()
    spoilt = done[3]
    with spoilt.file.open("r+b") as file:
        file.seek(spoilt.offset)
        file.write(b"\xff" * 8)
    assert json.loads(tool("megatron-to-hf", checkpoint, out, *options).out)["num_kept"] == 19
    assert_same_model(out, hf_dir)
    assert not list(tmp_path.glob("*.partial"))


def test_a_file_that_the_disk_does_not_take_leaves_work_to_go_on_with(tool: Tool, tmp_path: Path, hf_dir: Path, checkpoint: Path):
    out, options = tmp_path / "out", ("--hf-config", hf_dir, "--workers", 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        outcome = tool("megatron-to-hf", checkpoint, out, *options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert outcome.code == 1
    assert "model.safetensors cannot be written (File too large); free some space or raise the quota" in outcome.error
    assert not out.exists()
    assert tool("megatron-to-hf", checkpoint, out, *options).code == 0
    assert_same_model(out, hf_dir)


def test_a_dry_run_proves_and_writes_nothing(tool: Tool, tmp_path: Path, hf_dir: Path, checkpoint: Path):
    options = ("--hf-config", hf_dir, "--dry-run", "--json")
    summary = json.loads(tool("megatron-to-hf", checkpoint, tmp_path / "out", *options).out)
    assert summary["read_bytes"] == sum(tensor.nbytes for tensor in weights(hf_dir).values())
    assert summary["seconds"] >= 0 and summary["dry_run"] and summary["files"] == ["model.safetensors"]
    assert summary["num_settings_compared"] > 10
    assert not list(tmp_path.iterdir())


def copy_of(checkpoint: Path, target: Path) -> Path:
    shutil.copytree(checkpoint, target)
    return target


class Boom:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self._path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self._path,)


def truncate(checkpoint: Path, hf_dir: Path) -> str:
    file = checkpoint / "__0_0.distcp"
    os.truncate(file, file.stat().st_size - 100_000)
    return "__0_0.distcp has"


def remove_data(checkpoint: Path, hf_dir: Path) -> str:
    (checkpoint / "__0_0.distcp").unlink()
    return "__0_0.distcp cannot be read (No such file or directory)"


def remove_index(checkpoint: Path, hf_dir: Path) -> str:
    (checkpoint / ".metadata").unlink()
    return ".metadata cannot be read (No such file or directory)"


def remove_config(checkpoint: Path, hf_dir: Path) -> str:
    (checkpoint / "metadata.json").unlink()
    return "metadata.json is missing: the save was not completed"


def name_another_backend(checkpoint: Path, hf_dir: Path) -> str:
    (checkpoint / "metadata.json").write_text('{"sharded_backend": "fsdp_dtensor"}')
    return "is saved as 'fsdp_dtensor', must be 'torch_dist'"


def garble_index(checkpoint: Path, hf_dir: Path) -> str:
    (checkpoint / ".metadata").write_bytes(b"\x80\x04 not a pickle")
    return ".metadata is damaged"


def garble_data(checkpoint: Path, hf_dir: Path) -> str:
    file = checkpoint / "__0_0.distcp"
    file.write_bytes(b"\0" * file.stat().st_size)
    return "__0_0.distcp: "


def plant_in_index(checkpoint: Path, hf_dir: Path) -> str:
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Boom(checkpoint / "boom")))
    return ".metadata names posix.mkdir"


def plant_in_common(checkpoint: Path, hf_dir: Path) -> str:
    torch.save({"args": Boom(checkpoint / "boom")}, checkpoint / "common.pt")
    return "common.pt names posix.mkdir"


def plant_in_tensor(checkpoint: Path, hf_dir: Path) -> str:
    """A tensor's own table, of the same length."""
    file = checkpoint / "__0_0.distcp"
    content = file.read_bytes()
    assert b"ctorch._utils\n_rebuild_tensor_v2\n" in content
    file.write_bytes(content.replace(b"ctorch._utils\n_rebuild_tensor_v2\n", b"cos\nsystem\n".ljust(33, b"\n")))
    return "__0_0.distcp: "


def disagree(checkpoint: Path, hf_dir: Path) -> str:
    arguments = arguments_of(hf_dir) | {"num_query_groups": 8, "rotary_base": 500000}
    torch.save({"args": argparse.Namespace(**arguments)}, checkpoint / "common.pt")
    return (
        "num_query_groups is 8 in the checkpoint, 4 by config.json; rotary_base is 500000 in the checkpoint, 10000 by config.json"
    )


def use_larger_config(checkpoint: Path, hf_dir: Path) -> str:
    torch.save({}, checkpoint / "common.pt")
    change_config(hf_dir, intermediate_size=128)
    return "mlp.linear_fc1.weight: global shape (192, 64) must be (256, 64)"


def use_more_layers(checkpoint: Path, hf_dir: Path) -> str:
    torch.save({}, checkpoint / "common.pt")
    change_config(hf_dir, num_hidden_layers=5, layer_types=["full_attention"] * 5)
    return "lacks decoder.layers.4."


def use_fewer_layers(checkpoint: Path, hf_dir: Path) -> str:
    torch.save({}, checkpoint / "common.pt")
    change_config(hf_dir, num_hidden_layers=3, layer_types=["full_attention"] * 3)
    return "decoder.layers.3."


def use_larger_vocabulary(checkpoint: Path, hf_dir: Path) -> str:
    change_config(hf_dir, vocab_size=200)
    return "embedding.word_embeddings.weight: global shape (101, 64) must be (200, 64)"


def use_unknown_family(checkpoint: Path, hf_dir: Path) -> str:
    change_config(hf_dir, model_type="rwkv")
    return "model_type ('rwkv') must be one of"


def remove_hf_config(checkpoint: Path, hf_dir: Path) -> str:
    (hf_dir / "config.json").unlink()
    return "config.json cannot be read"


def make_unreadable_companion(checkpoint: Path, hf_dir: Path) -> str:
    (hf_dir / "config.json").write_text("{")
    return "config.json is no JSON"


def change_config(hf_dir: Path, **fields: Any) -> None:
    config = json.loads((hf_dir / "config.json").read_text())
    (hf_dir / "config.json").write_text(json.dumps(config | fields))


DAMAGES = (
    *(truncate, remove_data, remove_index, remove_config, name_another_backend, garble_index, garble_data),
    *(plant_in_index, plant_in_common, plant_in_tensor, disagree, use_larger_config, use_more_layers, use_fewer_layers),
    *(use_larger_vocabulary, use_unknown_family, remove_hf_config, make_unreadable_companion),
)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_bad_input_is_refused_in_one_line_before_anything_is_written(
    tool: Tool, tmp_path: Path, hf_dir: Path, checkpoint: Path, damage: Any
):
    broken, config = copy_of(checkpoint, tmp_path / "iter_0000100"), copy_of(hf_dir, tmp_path / "hf")
    expected = damage(broken, config)
    before = {path for path in tmp_path.rglob("*")}
    outcome = tool("megatron-to-hf", broken, tmp_path / "out", "--hf-config", config)
    assert outcome.code == 2
    assert expected in outcome.error
    assert {path for path in tmp_path.rglob("*")} == before


def test_a_missing_tensor_is_named(tool: Tool, tmp_path: Path, hf_dir: Path):
    name = "decoder.layers.2.mlp.linear_fc2.weight"
    checkpoint = write_torch_dist(hf_dir, tmp_path / "megatron", without=name)
    outcome = tool("megatron-to-hf", checkpoint, tmp_path / "out", "--hf-config", hf_dir)
    assert outcome.code == 2 and f"lacks {name}, which config.json asks for" in outcome.error


def test_a_tensor_that_no_model_has_is_named(tool: Tool, tmp_path: Path, hf_dir: Path):
    checkpoint = write_torch_dist(hf_dir, tmp_path / "megatron", extra={"decoder.layers.0.mlp.linear_fc1.bias": torch.zeros(192)})
    outcome = tool("megatron-to-hf", checkpoint, tmp_path / "out", "--hf-config", hf_dir)
    assert outcome.code == 2 and "decoder.layers.0.mlp.linear_fc1.bias is not a tensor of this model" in outcome.error


def test_other_formats_are_sent_to_their_command(tool: Tool, tmp_path: Path, hf_dir: Path):
    assert (
        "is a Hugging Face directory, and must be a torch_dist checkpoint"
        in tool("megatron-to-hf", hf_dir, tmp_path / "out").error
    )
    legacy = tmp_path / "legacy"
    (legacy / "iter_0000005" / "mp_rank_00").mkdir(parents=True)
    (legacy / "latest_checkpointed_iteration.txt").write_text("5\n")
    assert "lacks" in tool("megatron-to-hf", legacy, tmp_path / "out", "--hf-config", hf_dir).error


def test_an_existing_directory_is_kept_unless_force_is_given(tool: Tool, tmp_path: Path, hf_dir: Path, checkpoint: Path):
    out = tmp_path / "out"
    out.mkdir()
    save_file({"old": torch.zeros(1)}, out / "model.safetensors")
    assert "out exists" in tool("megatron-to-hf", checkpoint, out, "--hf-config", hf_dir).error
    assert list(weights(out)) == ["old"]
    assert tool("megatron-to-hf", checkpoint, out, "--hf-config", hf_dir, "--force").code == 0
    assert_same_model(out, hf_dir)


def test_the_newest_iteration_is_found_through_megatrons_tracker_file(tool: Tool, tmp_path: Path, hf_dir: Path, checkpoint: Path):
    root = tmp_path / "megatron"
    copy_of(checkpoint, root / "iter_0000100")
    (root / "latest_checkpointed_iteration.txt").write_text("100")
    shutil.copytree(hf_dir, root / "hf")
    assert tool("megatron-to-hf", root, tmp_path / "out").code == 0
    assert_same_model(tmp_path / "out", hf_dir)
    (root / "latest_checkpointed_iteration.txt").write_text("200")
    assert "iter_0000200 is no folder" in tool("megatron-to-hf", root, tmp_path / "out2").error


def test_objects_of_megatrons_own_classes_among_the_arguments_do_no_harm(
    tool: Tool, tmp_path: Path, hf_dir: Path, checkpoint: Path
):
    """What is not installed here, or an enum, is not needed."""
    copy = copy_of(checkpoint, tmp_path / "megatron")
    file = copy / "common.pt"
    torch.save({"args": argparse.Namespace(attention_backend=Boom(tmp_path / "boom"), **arguments_of(hf_dir))}, file)
    content = file.read_bytes().replace(b"cposix\nmkdir\n", b"cmegatron\nAB\n".ljust(13, b"\n"))
    assert b"megatron" in content
    file.write_bytes(content)
    assert tool("megatron-to-hf", copy, tmp_path / "out", "--hf-config", hf_dir).code == 0
    assert not (tmp_path / "boom").exists()
