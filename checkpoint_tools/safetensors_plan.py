"""Sharded safetensors files, laid out before a byte of a tensor is known: headers and offsets follow from names, shapes and dtypes.

A file is 8 bytes (length of the header, little-endian), the header (JSON: dtype, shape and place of each tensor), then the tensors.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from checkpoint_tools.spans import ITEMSIZE
from dapo_megatron.weights.hf_files import SINGLE_FILE

_ALIGNMENT = 8


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a header says of a tensor; `dtype` as safetensors names it."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


@dataclass(frozen=True, slots=True)
class FilePlan:
    """One file: `head` is its first bytes, `offsets` where each tensor starts in the file."""

    name: str
    head: bytes
    num_bytes: int
    offsets: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class SafetensorsPlan:
    """The files of a model; `index` is the text of the index file, None where there is one file only."""

    files: tuple[FilePlan, ...]
    index: str | None


def plan_files(tensors: Iterable[TensorSpec], shard_bytes: int) -> SafetensorsPlan:
    """Put tensors, in their order, into files of at most `shard_bytes` bytes of tensors; a larger tensor has a file of its own.

    Names are those of transformers: model.safetensors, or model-00001-of-00007.safetensors with an index.
    """
    shards: list[list[TensorSpec]] = [[]]
    room = shard_bytes
    for tensor in tensors:
        if shards[-1] and tensor.num_bytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(tensor)
        room -= tensor.num_bytes
    if len(shards) == 1:
        return SafetensorsPlan((_plan_file(SINGLE_FILE, shards[0]),), None)
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    index = {
        "metadata": {"total_size": sum(tensor.num_bytes for shard in shards for tensor in shard)},
        "weight_map": {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard},
    }
    files = tuple(_plan_file(name, shard) for name, shard in zip(names, shards, strict=True))
    return SafetensorsPlan(files, json.dumps(index, indent=2) + "\n")


def _plan_file(name: str, tensors: list[TensorSpec]) -> FilePlan:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts: dict[str, int] = {}
    end = 0
    # Wide elements first, so that each tensor starts at a multiple of its element's width.
    for tensor in sorted(tensors, key=lambda tensor: -ITEMSIZE[tensor.dtype]):
        starts[tensor.name] = end
        end += tensor.num_bytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [starts[tensor.name], end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    head = struct.pack("<Q", len(text)) + text
    return FilePlan(name, head, len(head) + end, {name: len(head) + start for name, start in starts.items()})
