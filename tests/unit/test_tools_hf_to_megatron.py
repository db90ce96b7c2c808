"""hf-to-megatron: what it writes, how it goes on after a kill or a full disk, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint_tools import cli, hf_to_megatron, import_plan
from checkpoint_tools.errors import WriteError
from checkpoint_tools.manifest import Manifest
from checkpoint_tools.torch_dist import TorchDistReader
from dapo_megatron.types import CheckpointError
from tests.published_configs import MOONLIGHT_16B_A3B
from tests.unit.weights_simulation import LLAMA_TIED, QWEN2, identity_fill

CONFIG = QWEN2 | {"max_position_embeddings": 64, "rms_norm_eps": 1e-6}
Tensors = dict[str, torch.Tensor]


def fill(config: dict[str, Any] = CONFIG, dtype: torch.dtype = torch.float32) -> Tensors:
    return {name: torch.from_numpy(tensor).to(dtype) for name, tensor in identity_fill(config).items()}


def save(directory: Path, tensors: Tensors, config: dict[str, Any] = CONFIG, shards: int = 1) -> Path:
    """An HF directory with a tokenizer, sharded when there is more than one shard."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text("{}")
    names = list(tensors)
    files = {f"model-{i}.safetensors": names[i::shards] for i in range(shards)} if shards > 1 else {"model.safetensors": names}
    for file, of_file in files.items():
        save_file({name: tensors[name] for name in of_file}, directory / file)
    if shards > 1:
        weight_map = {name: file for file, of_file in files.items() for name in of_file}
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def convert(source: Path, target: Path, dtype: Any = "keep", workers: int = 1, force: bool = False) -> None:
    hf_to_megatron.run(hf_to_megatron.Options(source, target, dtype, workers, 2**26, dry_run=False, force=force, as_json=False))


def content(folder: Path) -> dict[str, bytes]:
    """Everything but the record of the command line."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "provenance.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def back(checkpoint: Path, target: Path) -> Tensors:
    """Exported again by the reader, which shares only the mapping with the writer."""
    from checkpoint_tools.megatron_to_hf import Options, run

    run(Options(checkpoint, target, None, 2**30, 1, 2**26, dry_run=False, force=False, as_json=False))
    return load_file(target / "model.safetensors")


def equal(left: Tensors, right: Tensors) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


@pytest.fixture
def tiny_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of a few rows and files of a few tensors."""
    monkeypatch.setattr(import_plan, "CHUNK_BYTES", 500)
    monkeypatch.setattr(import_plan, "FILE_BYTES", 4000)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("shards", [1, 3])
def test_what_goes_in_comes_out_bit_by_bit(tmp_path: Path, tiny_pieces: None, workers: int, shards: int):
    tensors = fill()
    convert(save(tmp_path / "hf", tensors, shards=shards), tmp_path / "out", workers=workers)
    assert len(list((tmp_path / "out" / "release").glob("*.distcp"))) > 3
    assert equal(back(tmp_path / "out", tmp_path / "back"), tensors)


def test_output_does_not_depend_on_workers(tmp_path: Path, tiny_pieces: None):
    source = save(tmp_path / "hf", fill(), shards=2)
    for workers in (1, 2):
        convert(source, tmp_path / f"out{workers}", workers=workers)
    assert content(tmp_path / "out1") == content(tmp_path / "out2")


def test_pytorch_bin_gives_the_same_checkpoint_as_safetensors(tmp_path: Path):
    tensors = fill()
    save(tmp_path / "hf", tensors)
    save(tmp_path / "bin", tensors)
    (tmp_path / "bin" / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "bin" / "pytorch_model.bin")
    for name in ("hf", "bin"):
        convert(tmp_path / name, tmp_path / f"{name}_out")
    records = [Manifest.read(tmp_path / f"{name}_out") for name in ("hf", "bin")]
    assert records[0] == records[1]
    assert equal(back(tmp_path / "bin_out", tmp_path / "back"), tensors)


def test_bf16_rounds_as_torch_does(tmp_path: Path, tiny_pieces: None):
    tensors = {name: torch.randn(tensor.shape) for name, tensor in fill().items()}
    convert(save(tmp_path / "hf", tensors), tmp_path / "out", dtype="bf16")
    assert equal(back(tmp_path / "out", tmp_path / "back"), {name: tensor.bfloat16() for name, tensor in tensors.items()})


def test_fp8_weights_come_out_in_bf16_times_their_scales(tmp_path: Path, tiny_pieces: None):
    name = "model.layers.1.mlp.down_proj.weight"
    tensors = fill(dtype=torch.bfloat16)
    tensors[name] = torch.randn(tensors[name].shape).to(torch.float8_e4m3fn)
    scales = torch.rand(4, 6)
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [4, 4]}
    save(tmp_path / "hf", tensors | {f"{name}_scale_inv": scales}, CONFIG | {"quantization_config": quantization})
    convert(tmp_path / "hf", tmp_path / "out")
    spread = scales.repeat_interleave(4, 0).repeat_interleave(4, 1)
    expected = tensors | {name: (tensors[name].float() * spread).bfloat16()}
    assert equal(back(tmp_path / "out", tmp_path / "back"), expected)


def test_what_megatron_keeps_in_fp32_comes_back_as_it_was(tmp_path: Path):
    """A router's bias in bf16: fp32 in the checkpoint, bf16 in the manifest and in HF again."""
    from dapo_megatron.weights.plan import compile_mapping

    sizes = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MOONLIGHT_16B_A3B | sizes | {"num_key_value_heads": 2, "n_routed_experts": 4, "num_experts_per_tok": 2}
    tensors = {name: torch.randn(shape).bfloat16() for name, shape in compile_mapping(config).hf_tensors.items()}
    convert(save(tmp_path / "hf", tensors, config), tmp_path / "out")
    with TorchDistReader(tmp_path / "out" / "release") as reader:
        assert reader.tensors["decoder.layers.1.mlp.router.expert_bias"].dtype == "F32"
        assert reader.tensors["decoder.layers.1.mlp.router.weight"].dtype == "BF16"
    assert equal(back(tmp_path / "out", tmp_path / "back"), tensors)


def test_names_shapes_and_arguments_are_megatrons(tmp_path: Path):
    convert(save(tmp_path / "hf", fill()), tmp_path / "out")
    assert (tmp_path / "out" / "latest_checkpointed_iteration.txt").read_text() == "release"
    assert json.loads((tmp_path / "out" / "release" / "metadata.json").read_text())["sharded_backend"] == "torch_dist"
    with TorchDistReader(tmp_path / "out" / "release") as reader:
        shapes = {name: tensor.shape for name, tensor in reader.tensors.items()}
        arguments = vars(reader.common["args"])
    assert shapes["decoder.layers.self_attention.linear_qkv.weight"] == (2, 32, 16)
    assert shapes["decoder.layers.mlp.linear_fc1.layer_norm_weight"] == (2, 16)
    assert shapes["embedding.word_embeddings.weight"] == (21, 16)
    assert (arguments["num_layers"], arguments["num_query_groups"], arguments["padded_vocab_size"]) == (2, 4, 21)
    assert arguments["untie_embeddings_and_output_weights"] is True


def test_manifest_provenance_and_companions_lie_beside(tmp_path: Path):
    source = save(tmp_path / "hf", fill())
    convert(source, tmp_path / "out")
    manifest = Manifest.read(tmp_path / "out")
    provenance = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert manifest is not None and manifest.tensors.keys() == fill().keys()
    assert provenance["fingerprint"] == manifest.fingerprint()
    assert provenance["source"] == str(source) and provenance["model_type"] == "qwen2"
    assert {path.name for path in (tmp_path / "out" / "hf").iterdir()} == {"config.json", "tokenizer.json"}


def test_a_head_that_is_only_a_copy_is_left_out_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = LLAMA_TIED | {"max_position_embeddings": 64, "rms_norm_eps": 1e-6}
    tensors = fill(config)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    convert(save(tmp_path / "hf", tensors, config), tmp_path / "out")
    assert "lm_head.weight: tied to the embedding" in capsys.readouterr().out
    manifest = Manifest.read(tmp_path / "out")
    assert manifest is not None and list(manifest.skipped) == ["lm_head.weight"]


def test_a_dry_run_proves_and_predicts_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    source = save(tmp_path / "hf", fill())
    monkeypatch.setattr(
        sys, "argv", ["checkpoint-tools", "hf-to-megatron", str(source), str(tmp_path / "out"), "--dry-run", "--json"]
    )
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["read_bytes"] == sum(tensor.nbytes for tensor in fill().values())
    assert summary["written_bytes"] > summary["read_bytes"] and summary["dry_run"] and summary["num_hf_tensors"] == len(fill())
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


KILLED = """
import os, signal, sys
from pathlib import Path
from checkpoint_tools import hf_to_megatron, import_worker

class Killed(import_worker.ImportWorker):
    num_done = 0

    def work(self, task, report):
        if self.num_done == 5:
            super().work(task, lambda count: os.kill(os.getpid(), signal.SIGKILL))
        self.num_done += 1
        return super().work(task, report)

hf_to_megatron.ImportWorker = Killed
source, target = map(Path, sys.argv[1:])
hf_to_megatron.run(hf_to_megatron.Options(source, target, "keep", 1, 2**26, dry_run=False, force=False, as_json=False))
"""


@pytest.fixture
def killed(tmp_path: Path) -> tuple[Path, Path]:
    """A source and the place of an output whose making was killed in the middle of its sixth tensor."""
    source = save(tmp_path / "hf", fill(), shards=2)
    result = subprocess.run([sys.executable, "-c", KILLED, source, tmp_path / "out"], check=False, capture_output=True, text=True)
    assert result.returncode == -9, result.stderr
    assert not (tmp_path / "out").exists()
    return source, tmp_path / "out"


def test_a_killed_conversion_goes_on_to_the_same_bytes(killed: tuple[Path, Path], capsys: pytest.CaptureFixture[str]):
    source, target = killed
    convert(source, target)
    assert "5 of 17 megatron-core tensors were there and in order" in capsys.readouterr().out
    convert(source, target.with_name("whole"))
    assert content(target) == content(target.with_name("whole"))
    assert not target.with_name("out.partial").exists()


def test_what_was_finished_is_checked_and_not_trusted(killed: tuple[Path, Path], capsys: pytest.CaptureFixture[str]):
    source, target = killed
    journal = target.with_name("out.partial") / "journal.jsonl"
    assert len(journal.read_text().splitlines()) == 1 + 5
    written = target.with_name("out.partial") / "output" / "release" / "__0_0.distcp"
    damaged = bytearray(written.read_bytes())
    damaged[400] ^= 1  # an element of the first tensor
    written.write_bytes(damaged)
    convert(source, target)
    assert "4 of 17 megatron-core tensors were there and in order" in capsys.readouterr().out
    convert(source, target.with_name("whole"))
    assert content(target) == content(target.with_name("whole"))


def test_a_source_that_changed_meanwhile_is_refused(killed: tuple[Path, Path]):
    source, target = killed
    save(source, fill(CONFIG, torch.bfloat16), shards=2)
    with pytest.raises(CheckpointError, match=r"out\.partial holds unfinished work of another conversion .*num_bytes"):
        convert(source, target)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], check=False, capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"mounting a small tmpfs is not allowed here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


WIDE = CONFIG | {"vocab_size": 20000}
"""2.6 MB in fp32."""


def test_a_disk_without_room_is_refused_before_work(tmp_path: Path, small_disk: Path):
    source = save(tmp_path / "hf", fill(WIDE), WIDE)
    with pytest.raises(CheckpointError, match=r"out needs 2\.[0-9]+ MB, and .*disk has .* free"):
        convert(source, small_disk / "out")
    assert not list(small_disk.iterdir())


def test_a_disk_that_fills_up_leaves_work_to_go_on_with(
    tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    source = save(tmp_path / "hf", fill(WIDE), WIDE)
    with monkeypatch.context() as patch:
        patch.setattr(hf_to_megatron, "check_room", lambda final, num_bytes: None)  # somebody else fills the disk later
        with pytest.raises(WriteError, match=r"__0_0\.distcp cannot be written \(No space left.*run the same command again"):
            convert(source, small_disk / "out")
    assert not (small_disk / "out").exists()
    subprocess.run(["mount", "-o", "remount,size=8m", small_disk], check=True)
    convert(source, small_disk / "out")
    assert " of 17 megatron-core tensors were there and in order" in capsys.readouterr().out
    convert(source, tmp_path / "whole")
    assert content(small_disk / "out") == content(tmp_path / "whole")


def with_config(**changes: Any) -> Callable[[Path], None]:
    return lambda hf: save(hf, fill(), {key: value for key, value in (CONFIG | changes).items() if value is not None}) and None


def with_tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Path], None]:
    """One tensor changed, or left out when the change gives None."""

    def mutate(hf: Path) -> None:
        tensors = fill()
        changed = change(tensors.pop(name, torch.zeros(3)))
        save(hf, tensors if changed is None else tensors | {name: changed})

    return mutate


def with_file(name: str, change: Callable[[bytes], bytes | None], shards: int = 1) -> Callable[[Path], None]:
    """One file changed, or removed when the change gives None."""

    def mutate(hf: Path) -> None:
        save(hf, fill(), shards=shards)
        path = hf / name
        changed = change(path.read_bytes())
        path.unlink()
        if changed is not None:
            path.write_bytes(changed)

    return mutate


def swap_files(index: bytes) -> bytes:
    return index.replace(b"model-0", b"model-2").replace(b"model-1", b"model-0").replace(b"model-2", b"model-1")


class Command:
    def __reduce__(self) -> Any:
        return print, ("unpickled",)


def with_pickle(content: Any) -> Callable[[Path], None]:
    def mutate(hf: Path) -> None:
        save(hf, fill())
        (hf / "model.safetensors").unlink()
        torch.save(content, hf / "pytorch_model.bin")

    return mutate


NORM, QUERY, DOWN = "model.norm.weight", "model.layers.1.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"
INDEX = "model.safetensors.index.json"
BAD_INPUT: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated safetensors": (with_file("model.safetensors", lambda data: data[:-100]), r"model\.safetensors cannot be read"),
    "truncated header": (with_file("model.safetensors", lambda data: data[:50]), r"model\.safetensors cannot be read"),
    "empty safetensors": (with_file("model.safetensors", lambda data: b""), r"model\.safetensors cannot be read"),
    "no safetensors at all": (with_file("model.safetensors", lambda data: b"\x00" * 999), r"model\.safetensors cannot be read"),
    "missing shard": (
        with_file("model-1.safetensors", lambda data: None, shards=3),
        r"model-1\.safetensors cannot be read .*No such",
    ),
    "truncated shard": (
        with_file("model-2.safetensors", lambda data: data[:-1], shards=3),
        r"model-2\.safetensors cannot be read",
    ),
    "index is no JSON": (with_file(INDEX, lambda data: data[:20], shards=2), r"index\.json is no index of weights"),
    "index without map": (with_file(INDEX, lambda data: b"{}", shards=2), r"index\.json is no index of weights"),
    "index names the wrong file": (with_file(INDEX, swap_files, shards=2), r"model-1\.safetensors lacks"),
    "index leaves the folder": (
        with_file(INDEX, lambda data: data.replace(b'"model-0', b'"../model-0'), shards=2),
        r"'\.\./model-0\.safetensors', which must be a file beside it",
    ),
    "no weights": (with_file("model.safetensors", lambda data: None), r"hf must have model\.safetensors, pytorch_model\.bin"),
    "no config": (with_file("config.json", lambda data: None), r"config\.json cannot be read \(No such file"),
    "config is no JSON": (with_file("config.json", lambda data: b"{"), r"config\.json is no JSON"),
    "config is another model's": (
        with_config(intermediate_size=32),
        r"gate_proj\.weight has shape \(24, 16\), its config.json asks for \(32, 16\)",
    ),
    "vocabulary does not match": (with_config(vocab_size=22), r"embed_tokens\.weight has shape \(21, 16\).* asks for \(22, 16\)"),
    "unknown architecture": (with_config(model_type="mamba"), r"model_type \('mamba'\) must be one of .*llama"),
    "config without a size": (with_config(hidden_size=None), r"hidden_size \(None\) must be a positive integer"),
    "heads that groups do not divide": (with_config(num_key_value_heads=3), r"num_key_value_heads \(3\) must divide .* \(8\)"),
    "quantised model": (
        with_config(quantization_config={"quant_method": "gptq"}),
        r"quantization_config .*gptq.* must be absent",
    ),
    "missing tensor": (with_tensor(NORM, lambda tensor: None), r"hf lacks model\.norm\.weight"),
    "tensor of another shape": (
        with_tensor(NORM, lambda tensor: torch.full((17,), torch.nan)),
        r"model\.norm\.weight has shape \(17,\)",
    ),
    "tensor that nobody knows": (with_tensor("model.extra", lambda tensor: tensor), r"hf has model\.extra \(3,\)"),
    "tensor of whole numbers": (
        with_tensor(DOWN, lambda tensor: tensor.to(torch.int8)),
        r"1\.mlp\.down_proj\.weight is I8, must be",
    ),
    "q, k, v of two dtypes": (
        with_tensor(QUERY, lambda tensor: tensor.bfloat16()),
        r"q_proj\.weight is BF16 .*k_proj\.weight is F32|k_proj\.weight is F32.*q_proj",
    ),
    "layers of two dtypes": (
        with_tensor(DOWN, lambda tensor: tensor.bfloat16()),
        r"0\.mlp\.down_proj\.weight is F32 and .*1\.mlp\.down_proj\.weight is BF16.*--dtype bf16",
    ),
    "FP8 without scales": (with_tensor(DOWN, lambda tensor: tensor.to(torch.float8_e4m3fn)), r"must have a quantization_config"),
    "bin with a command": (with_pickle({NORM: Command()}), r"pytorch_model\.bin holds more than weights"),
    "bin of a list": (with_pickle([torch.zeros(2)]), r"pytorch_model\.bin holds a list"),
}


def run_command(arguments: Sequence[str | Path], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The exit code of the command line."""
    monkeypatch.setattr(sys, "argv", ["checkpoint-tools", "hf-to-megatron", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    return exit_.value.code


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_and_leaves_nothing(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    mutate, message = BAD_INPUT[case]
    mutate(tmp_path / "hf")
    assert run_command([tmp_path / "hf", tmp_path / "out"], monkeypatch) == cli.EXIT_BAD_INPUT
    output = capsys.readouterr()
    assert output.err.startswith("error: ") and output.err.count("\n") == 1 and re.search(message, output.err), output.err
    assert output.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-memory", "lots"], r"'lots' must be a number of bytes such as 8GiB"),
        (["--max-memory", "1MiB"], r"--max-memory \(1\.05 MB\) must be at least 4\.19 MB"),
        (["--dtype", "int4"], r"--dtype.*'int4'"),
        (["--workers", "0"], r"--workers \(0\) must be at least 1"),
    ],
)
def test_bad_options_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
):
    save(tmp_path / "hf", fill())
    assert run_command([tmp_path / "hf", tmp_path / "out", *arguments], monkeypatch) == cli.EXIT_BAD_INPUT
    assert re.search(message, capsys.readouterr().err, re.DOTALL)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_complete_output_is_not_overwritten_without_force(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    source = save(tmp_path / "hf", fill())
    convert(source, tmp_path / "out")
    before = content(tmp_path / "out")
    assert run_command([source, tmp_path / "out"], monkeypatch) == cli.EXIT_BAD_INPUT
    assert "out exists" in capsys.readouterr().err
    save(source, fill(CONFIG, torch.bfloat16))
    assert content(tmp_path / "out") == before
    convert(source, tmp_path / "out", force=True)
    assert content(tmp_path / "out") != before and [path.name for path in tmp_path.iterdir()] == ["hf", "out"]


AS_NOBODY = """
import os
from checkpoint_tools import cli, hf_to_megatron  # imported, and typer's parts by --help, while the interpreter can be read
cli.app(["hf-to-megatron", "--help"], standalone_mode=False)
os.setuid(65534)
cli.main()
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody without permission")
def test_paths_without_permission_are_named(tmp_path: Path):
    source = save(tmp_path / "hf", fill())
    open_to_all = Path(tempfile.mkdtemp())
    try:
        open_to_all.chmod(0o755)
        for path in [open_to_all / "hf", *shutil.copytree(source, open_to_all / "hf").iterdir()]:
            path.chmod(0o755)
        cases = {
            source: (open_to_all / "out", r"hf/config\.json cannot be read \(Permission denied\)"),
            open_to_all / "hf": (open_to_all / "out", r"out\.partial cannot be written \(Permission denied\); choose a folder"),
        }
        for path, (target, message) in cases.items():
            command = [sys.executable, "-c", AS_NOBODY, "hf-to-megatron", path, target]
            result = subprocess.run(command, check=False, capture_output=True, text=True)
            assert result.returncode == cli.EXIT_BAD_INPUT, result.stderr
            assert re.fullmatch(f"error: .*{message}.*\n", result.stderr), result.stderr
        assert [path.name for path in open_to_all.iterdir()] == ["hf"]
    finally:
        shutil.rmtree(open_to_all)
