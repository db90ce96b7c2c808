"""Sizes, manifest and the frame of torch.save."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
import torch

from checkpoint_tools.byte_sizes import format_bytes, parse_bytes
from checkpoint_tools.disk_probe import DiskRates, probe_disks
from checkpoint_tools.manifest import MANIFEST_FILE, Manifest, TensorRecord
from checkpoint_tools.torch_zip import frame
from dapo_megatron.types import CheckpointError, ConfigError

MANIFEST = Manifest({"a": TensorRecord((2, 3), "BF16", "00ff")}, {"b": "tied"})


@pytest.mark.parametrize(
    ("text", "count"), [("8GiB", 8 * 2**30), ("1.5 GB", 1_500_000_000), ("512MiB", 2**29), ("7", 7), ("2k", 2000)]
)
def test_sizes_are_read_as_people_write_them(text: str, count: int):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "8 gallons", "-1GB"])
def test_what_is_no_size_is_refused(text: str):
    with pytest.raises(ConfigError, match="must be a number of bytes such as 8GiB"):
        parse_bytes(text)


def test_sizes_are_shown_with_three_digits():
    assert [format_bytes(n) for n in (7, 15_231_000_000, 999_600, 5e12)] == ["7 B", "15.2 GB", "1 MB", "5 TB"]


def test_a_manifest_is_read_as_it_was_written(tmp_path: Path):
    MANIFEST.write(tmp_path)
    assert Manifest.read(tmp_path) == MANIFEST
    assert Manifest.read(tmp_path / "elsewhere") is None


def test_an_edited_manifest_is_refused(tmp_path: Path):
    MANIFEST.write(tmp_path)
    text = json.loads((tmp_path / MANIFEST_FILE).read_text())
    text["tensors"]["a"]["xxh3"] = "0000"
    (tmp_path / MANIFEST_FILE).write_text(json.dumps(text))
    with pytest.raises(CheckpointError, match="it was changed"):
        Manifest.read(tmp_path)
    (tmp_path / MANIFEST_FILE).write_text("{")
    with pytest.raises(CheckpointError, match="is damaged"):
        Manifest.read(tmp_path)


def test_a_dry_run_reads_and_writes_the_disk_and_leaves_nothing(tmp_path: Path):
    source = tmp_path / "source"
    source.write_bytes(bytes(1000))
    rates = probe_disks(source, tmp_path / "new" / "out")
    assert rates.read > 0 and rates.write > 0 and rates.same_disk
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_one_disk_reads_and_writes_in_turn():
    assert DiskRates(100, 50, same_disk=True).predicted_seconds(100, 100) == 3
    assert DiskRates(100, 50, same_disk=False).predicted_seconds(100, 100) == 2


@pytest.mark.parametrize(
    ("name", "dtype"), [("BF16", torch.bfloat16), ("F16", torch.float16), ("F32", torch.float32), ("F64", torch.float64)]
)
@pytest.mark.parametrize("shape", [(5,), (2, 300), (1, 70000, 2), (1, 2, 3, 4)])
def test_framed_elements_are_what_torch_loads(name: str, dtype: torch.dtype, shape: tuple[int, ...]):
    tensor = torch.arange(math.prod(shape)).reshape(shape).to(dtype)
    framed = frame(name, shape)
    loaded = torch.load(io.BytesIO(framed.before + tensor.view(torch.uint8).numpy().tobytes() + framed.after), weights_only=True)
    assert loaded.dtype == dtype and loaded.equal(tensor) and loaded.is_contiguous()
