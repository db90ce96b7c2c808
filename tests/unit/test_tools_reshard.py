"""reshard: what it says, what it refuses, and layouts that no rank on a CPU has."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint_tools.legacy_layout import deal_layers
from tests.legacy import FILE, change_rank, load_rank, write_legacy
from tests.tiny_models import make_hf_model
from tests.tools import Tool
from tests.torch_dist import write_torch_dist

NORM = "decoder.layers.1.input_layernorm.weight"
WORD_EMBEDDINGS = "embedding.word_embeddings.weight"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Tool:
    return Tool(monkeypatch, capsys)


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf_model(tmp_path_factory.mktemp("hf") / "qwen2", "qwen2")


@pytest.fixture(scope="module")
def moe_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf_model(tmp_path_factory.mktemp("moe") / "qwen3_moe", "qwen3_moe", num_hidden_layers=2)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, hf_dir: Path) -> Path:
    """On one rank."""
    return write_legacy(hf_dir, tmp_path_factory.mktemp("legacy") / "whole", make_vocab_size_divisible_by=1)


@pytest.fixture
def four_ranks(tool: Tool, tmp_path: Path, whole: Path) -> Path:
    """Under TP2 and PP2."""
    assert tool("reshard", whole, tmp_path / "four", "--tensor", 2, "--pipeline", 2).code == 0
    return tmp_path / "four"


def test_there_and_back_every_file_has_its_bytes(tool: Tool, tmp_path: Path, whole: Path, hf_dir: Path, four_ranks: Path):
    options = ("--tensor", 1, "--pipeline", 1)
    outcome = tool("reshard", four_ranks / "iter_0000100", tmp_path / "back", *options)
    assert outcome.code == 0 and "TP 2, PP 2 -> TP 1, PP 1" in outcome.out
    before, after = (load_rank(folder, "mp_rank_00") for folder in (whole, tmp_path / "back"))
    assert before["model"].keys() == after["model"].keys()
    assert all(value.equal(after["model"][name]) for name, value in before["model"].items())
    assert vars(after["args"]).items() >= vars(before["args"]).items()
    outcome = tool("verify", four_ranks, whole, "--hf-config", hf_dir)
    assert outcome.code == 0 and "bit-exact: 50 of 50 tensors" in outcome.out
    assert tool("megatron-to-hf", four_ranks, tmp_path / "hf", "--hf-config", hf_dir).code == 0
    assert "bit-exact: 50 of 50 tensors" in tool("verify", tmp_path / "hf", hf_dir).out


def test_summary_manifest_and_how_to_load_it(tool: Tool, tmp_path: Path, whole: Path):
    out = tmp_path / "out"
    text = tool("reshard", whole, out, "--pipeline", 2, "--layers-per-stage", "1,3").out
    assert "--decoder-first-pipeline-num-layers 1 --decoder-last-pipeline-num-layers 3" in text
    assert load_rank(out, "mp_rank_00_001")["args"].decoder_last_pipeline_num_layers == 3
    records = json.loads((out / "manifest.json").read_text())["tensors"]
    assert records[f"mp_rank_00_001/model.{WORD_EMBEDDINGS.replace('embedding.word_embeddings', 'output_layer')}"]["shape"] == [
        101,
        64,
    ]
    assert json.loads((out / "provenance.json").read_text())["layers_per_stage"] == [1, 3]
    summary = json.loads(tool("reshard", whole, out, "--pipeline", 4, "--layers-per-stage", "0,1,2,1", "--force", "--json").out)
    assert "--pipeline-model-parallel-layout 'E|t|tt|tL'" in summary["load_with"]
    assert load_rank(out, "mp_rank_00_003")["args"].pipeline_model_parallel_layout == "E|t|tt|tL"


def test_a_dry_run_proves_and_writes_nothing(tool: Tool, tmp_path: Path, whole: Path):
    summary = json.loads(tool("reshard", whole, tmp_path / "out", "--tensor", 4, "--dry-run", "--json").out)
    assert (summary["num_files"], summary["num_parameters"], summary["num_kept"]) == (4, 130_432, 0)
    assert not list(tmp_path.iterdir())


def test_a_killed_run_goes_on_and_checks_what_it_finds(
    tool: Tool, tmp_path: Path, whole: Path, four_ranks: Path, monkeypatch: pytest.MonkeyPatch
):
    from checkpoint_tools.export_worker import ExportWorker

    work, done = ExportWorker.work, []

    def work_until_killed(self: ExportWorker, task: Any, report: Any) -> str:
        if len(done) == 20:
            raise KeyboardInterrupt
        done.append(task)
        return work(self, task, report)

    out, options = tmp_path / "out", ("--tensor", 2, "--pipeline", 2, "--json", "--workers", 1)
    with monkeypatch.context() as patch:
        patch.setattr(ExportWorker, "work", work_until_killed)
        assert tool("reshard", whole, out, *options).code == 130
    assert not out.exists()
    with done[3].file.open("r+b") as file:
        file.seek(done[3].offset)
        file.write(b"\xff" * 8)
    assert json.loads(tool("reshard", whole, out, *options).out)["num_kept"] == 19
    for file in four_ranks.rglob("*.pt"):
        assert (out / file.relative_to(four_ranks)).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("workers", [1, 2])
def test_experts_of_a_grouped_linear_keep_their_names(tool: Tool, tmp_path: Path, moe_dir: Path, workers: int):
    source = write_legacy(moe_dir, tmp_path / "source", grouped_experts=True, make_vocab_size_divisible_by=1)
    out = tmp_path / "out"
    outcome = tool("reshard", source, out, "--tensor", 2, "--expert", 4, "--workers", workers)
    assert outcome.code == 0 and "emptied: TransformerEngine's scaling state" in outcome.out
    assert len(list(out.rglob("*.pt"))) == 8
    assert load_rank(out, "mp_rank_01_002")["model"]["decoder.layers.0.mlp.experts.linear_fc1._extra_state"] is None
    content = torch.load(source / "iter_0000100" / "mp_rank_00" / FILE, weights_only=False)
    before = content["model"]["decoder.layers.1.mlp.experts.linear_fc1.weight7"]
    after = [
        load_rank(out, f"mp_rank_0{rank}_003")["model"]["decoder.layers.1.mlp.experts.linear_fc1.weight1"] for rank in (0, 1)
    ]
    gate, up = before.chunk(2)
    assert all(after[rank].equal(torch.cat([gate.chunk(2)[rank], up.chunk(2)[rank]])) for rank in (0, 1))
    outcome = tool("verify", out, moe_dir, "--hf-config", moe_dir)
    assert outcome.code == 0, outcome.out + outcome.err


def test_vocabulary_is_padded_anew_and_padding_rows_are_said(tool: Tool, tmp_path: Path, hf_dir: Path):
    source = write_legacy(hf_dir, tmp_path / "source")
    outcome = tool("reshard", source, tmp_path / "tp2", "--tensor", 2)
    assert "vocabulary: 101 tokens padded to 256 rows, 101 before: 155 rows of zeros added" in outcome.out
    parts = [load_rank(tmp_path / "tp2", f"mp_rank_0{rank}") for rank in (0, 1)]
    assert [part["args"].padded_vocab_size for part in parts] == [256, 256]
    rows = torch.cat([part["model"][WORD_EMBEDDINGS] for part in parts])
    assert rows[:101].equal(load_rank(source, "mp_rank_00")["model"][WORD_EMBEDDINGS]) and not rows[101:].any()
    change_rank(tmp_path / "tp2", "mp_rank_00", lambda content: content["model"][WORD_EMBEDDINGS][110:].fill_(7))
    options = ("--tensor", 1, "--make-vocab-size-divisible-by", 4)
    outcome = tool("reshard", tmp_path / "tp2", tmp_path / "tp1", *options)
    assert "vocabulary: 101 tokens padded to 104 rows, 256 before: 152 rows of padding cut" in outcome.out
    assert load_rank(tmp_path / "tp1", "mp_rank_00")["model"][WORD_EMBEDDINGS].equal(rows[:104])
    for rank in ("mp_rank_00", "mp_rank_01"):
        change_rank(tmp_path / "tp2", rank, lambda content: delattr(content["args"], "vocab_size"))
    outcome = tool("reshard", tmp_path / "tp2", tmp_path / "tp8", "--tensor", 4, "--force")
    assert "256 rows are kept, padding or not, 256 rows of zeros added; --vocab-size tells" in outcome.out
    assert "must be in 1..256" in tool("reshard", tmp_path / "tp2", tmp_path / "x", "--vocab-size", 300).error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tensor", 3), "--tensor (3) must divide the heads and every tensor, and divide the query groups (4)"),
        (("--tensor", 3), "choose one of [1, 2, 4, 8]"),
        (("--pipeline", 3), "--pipeline (3) must divide the 4 layers; choose one of [1, 2, 4], or say how many layers"),
        (("--pipeline", 2, "--virtual-pipeline", 3), "must divide the layers of each stage (2,2); choose one of [1, 2]"),
        (("--virtual-pipeline", 2), "--virtual-pipeline (2) needs --pipeline above 1"),
        (("--pipeline", 2, "--layers-per-stage", "1,2"), "must be 2 numbers with the sum 4"),
        (("--layers-per-stage", "1;3"), "must be numbers with commas between"),
        (("--tensor", 2, "--expert-tensor", 4), "must divide tensor size (2)"),
        (("--expert", 2), "--expert (2) must divide the 1 experts; choose one of [1]"),
        (("--expert", 0), "expert size (0) must be at least 1"),
        (("--make-vocab-size-divisible-by", 0), "must be at least 1"),
    ],
)
def test_a_layout_that_cannot_divide_is_refused_with_the_sizes_that_can(
    tool: Tool, tmp_path: Path, whole: Path, options: tuple[object, ...], message: str
):
    outcome = tool("reshard", whole, tmp_path / "out", *options)
    assert outcome.code == 2 and message in outcome.error
    assert not list(tmp_path.iterdir())


def spoil_norm(content: dict[str, Any]) -> None:
    content["model"][NORM.replace("layers.1", "layers.0")][5] += 1


class Shell:
    """Unpickled by a careless reader, it would run a command."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("exit 1",)


@pytest.mark.parametrize(
    ("rank", "change", "message"),
    [
        ("mp_rank_01_001", lambda content: content.update(iteration=200), "iteration is 200"),
        (
            "mp_rank_01_000",
            spoil_norm,
            f"{NORM.replace('layers.1', 'layers.0')} must be equal in mp_rank_00_000 and mp_rank_01_000",
        ),
        (
            "mp_rank_01_001",
            lambda content: content["model"].pop("decoder.layers.1.mlp.linear_fc2.weight"),
            "columns 48:96 covered by",
        ),
        (
            "mp_rank_00_001",
            lambda content: content["model"]["output_layer.weight"].zero_(),
            f"{WORD_EMBEDDINGS} must be equal in",
        ),
        ("mp_rank_00_000", lambda content: content["model"].update(strange=torch.zeros(3)), "strange: it is not known how"),
        (
            "mp_rank_00_000",
            lambda content: content["model"].update({"mtp.layers.0.x": torch.zeros(3)}),
            "for multi-token prediction",
        ),
        ("mp_rank_00_000", lambda content: content["model"].update({NORM: 3}), f"{NORM} is no plain tensor but a int"),
        ("mp_rank_00_000", lambda content: content["model"].update({NORM: torch.zeros(65)}), "over all ranks, another rank has"),
        ("mp_rank_00_000", lambda content: content.pop("args"), "has no args, which say how the ranks were laid out"),
        ("mp_rank_00_000", lambda content: content.update(checkpoint_version=2.0), "has checkpoint_version 2.0, must be 3.0"),
        ("mp_rank_01_000", lambda content: content.update(model={"language_model": {}}), "before there was megatron-core"),
        ("mp_rank_01_000", lambda content: content.pop("model"), "has no model"),
        (
            "mp_rank_00_000",
            lambda content: setattr(content["args"], "num_layers", 5),
            "the ranks have 4 layers, their args say 5",
        ),
        (
            "mp_rank_00_001",
            lambda content: content.update(x=Shell()),
            "names posix.system, which no such file needs; it was not run",
        ),
    ],
)
def test_a_bad_checkpoint_is_refused_by_file_and_tensor(
    tool: Tool, tmp_path: Path, four_ranks: Path, rank: str, change: Callable[[dict[str, Any]], object], message: str
):
    change_rank(four_ranks, rank, change)
    outcome = tool("reshard", four_ranks, tmp_path / "out", "--tensor", 1)
    assert outcome.code == 2 and message in outcome.error, outcome.err
    assert not list(tmp_path.glob("out*"))


def test_missing_and_truncated_files_are_named(tool: Tool, tmp_path: Path, four_ranks: Path, hf_dir: Path):
    file = four_ranks / "iter_0000100" / "mp_rank_01_001" / FILE
    content = file.read_bytes()
    file.write_bytes(content[:-1000])
    assert f"{file} is damaged" in tool("reshard", four_ranks, tmp_path / "out", "--tensor", 1).error
    shutil.rmtree(file.parent)
    for command in (("reshard",), ("megatron-to-hf", "--hf-config", hf_dir)):
        error = tool(*command, four_ranks, tmp_path / "out").error
        assert "lacks mp_rank_01_001/model_optim_rng.pt: 1 of 4 rank files of TP 2, PP 2 are missing" in error


def test_torch_dist_needs_no_resharding(tool: Tool, tmp_path: Path, hf_dir: Path):
    write_torch_dist(hf_dir, tmp_path / "iter_0000100")
    outcome = tool("reshard", tmp_path / "iter_0000100", tmp_path / "out", "--tensor", 2)
    assert outcome.code == 2 and "loads under any layout as it is: there is nothing to reshard" in outcome.error
    assert "must be a legacy mp_rank_* checkpoint" in tool("reshard", hf_dir, tmp_path / "out", "--tensor", 2).error


def test_layers_are_dealt_chunk_by_chunk():
    assert deal_layers(8, 2, 2, None) == ((2, 2), (2, 2))
    assert deal_layers(8, 2, 2, [2, 6]) == ((1, 1), (3, 3))
