"""The reader of foreign pickles: what it knows comes out, nothing it names is called."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties as OldTensorProperties
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from checkpoint_tools.safe_pickle import BytesMetadata, Inert, StoredTensor, load_common, load_index
from dapo_megatron.types import CheckpointError


class Call:
    """Pickled as a call."""

    def __init__(self, function: Any, *arguments: object):
        self._call = function, arguments

    def __reduce__(self) -> Any:
        return self._call


@pytest.mark.parametrize("properties", [TensorProperties, OldTensorProperties], ids=["now", "torch_before_2_3"])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_an_index_that_torch_wrote_is_read_whatever_the_version(properties: Any, protocol: int):
    size = torch.Size([4, 6])
    tensor = TensorStorageMetadata(properties(dtype=torch.bfloat16), size, [ChunkStorageMetadata(torch.Size([0, 0]), size)])
    index = Metadata(
        state_dict_metadata={"x": tensor, "rng/shard_0_1": BytesStorageMetadata()},
        storage_data={
            MetadataIndex("x", torch.Size([0, 0])): _StorageInfo("__0_0.distcp", 5, 100),
            MetadataIndex("rng/shard_0_1"): _StorageInfo("__0_0.distcp", 105, 7),
        },
        storage_meta=StorageMeta(checkpoint_id=Path("/somewhere")),
    )
    found = load_index(pickle.dumps(index, protocol=protocol), ".metadata")
    x = found.state_dict_metadata["x"]
    assert (x.properties.dtype, x.size, x.chunks[0].sizes) == ("bfloat16", (4, 6), (4, 6))
    assert isinstance(found.state_dict_metadata["rng/shard_0_1"], BytesMetadata)
    places = {
        (place.fqn, place.offset): (info.relative_path, info.offset, info.length) for place, info in found.storage_data.items()
    }
    assert places == {("x", (0, 0)): ("__0_0.distcp", 5, 100), ("rng/shard_0_1", None): ("__0_0.distcp", 105, 7)}


@pytest.mark.parametrize(
    "call",
    [
        Call(os.system, "touch boom"),
        Call(eval, "open('boom', 'w')"),
        Call(getattr, "text", "format"),
        Call(torch.load, "boom"),
        Call(__import__, "boom"),
        Call(print, "boom"),
    ],
    ids=["os.system", "eval", "getattr", "torch.load", "import", "print"],
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_name_that_is_not_known_is_said_and_not_called(
    call: Call, protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"names .*; it was not run: do not trust this checkpoint"):
        load_index(pickle.dumps({"harmless": 1, "not": call}, protocol=protocol), ".metadata")
    file = io.BytesIO()
    torch.save({"args": argparse.Namespace(x=call)}, file)
    with pytest.raises(CheckpointError, match="it was not run"):
        load_common(file, "common.pt")
    assert not list(tmp_path.iterdir()) and not capsys.readouterr().out


def test_dotted_names_do_not_reach_through_a_known_module():
    """Protocol 4 may name an attribute of an attribute."""
    data = b"\x80\x04\x8c\x05torch\x8c\x0dfloat32.__str\x93."
    with pytest.raises(CheckpointError, match=r"names torch\.float32\.__str"):
        load_index(data, ".metadata")


def test_arguments_come_out_and_megatrons_own_objects_are_inert():
    file = io.BytesIO()
    args = argparse.Namespace(num_layers=4, lr=1e-5, params_dtype=torch.bfloat16, sizes=torch.Size([2]), tensor=torch.ones(2, 3))
    torch.save({"args": args, "iteration": 7}, file)
    found = load_common(file, "common.pt")
    assert (found["iteration"], found["args"].num_layers, found["args"].lr) == (7, 4, 1e-5)
    assert (found["args"].params_dtype, found["args"].sizes) == ("bfloat16", (2,))
    assert isinstance(found["args"].tensor, StoredTensor) and found["args"].tensor.shape == (2, 3)
    data = pickle.dumps({"backend": Call(os.system, "x")}, protocol=0).replace(
        b"cposix\nsystem\n", b"cmegatron.core.enums\nAny\n"
    )
    assert isinstance(load_bare(data)["backend"], Inert)


def load_bare(data: bytes) -> Any:
    """A bare pickle in the place of the one inside a torch file."""
    file = io.BytesIO()
    torch.save({}, file)
    rewritten = io.BytesIO()
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(rewritten, "w") as new:
        for name in old.namelist():
            new.writestr(name, data if name.endswith("data.pkl") else old.read(name))
    return load_common(rewritten, "common.pt")
