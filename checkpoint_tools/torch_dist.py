"""What a megatron-core `torch_dist` checkpoint holds and where each element lies: no process group, no model, no rank layout.

    DIRECTORY/metadata.json     {"sharded_backend": "torch_dist", ...}
    DIRECTORY/.metadata         pickle: for each tensor its global shape, dtype and saved chunks, for each chunk its place in a file
    DIRECTORY/__R_N.distcp      of rank R: chunks one after the other, each a file of `torch.save`
    DIRECTORY/common.pt         what is no tensor (Megatron-LM's arguments); newer versions of megatron-core keep it as an
                                object `common_state` among the chunks

Only the index and the places of the chunks are kept in memory; `spans.py` reads the elements.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self, cast

import numpy as np

from checkpoint_tools.safe_pickle import (
    DTYPES,
    BytesMetadata,
    Metadata,
    TensorMetadata,
    load_common,
    load_index,
    load_tensor_description,
)
from checkpoint_tools.spans import ITEMSIZE, SpanReader
from checkpoint_tools.torch_archive import TorchArchive
from dapo_megatron.types import CheckpointError

INDEX, CONFIG, COMMON = ".metadata", "metadata.json", "common.pt"
_BACKEND = "torch_dist"
_COMMON_OBJECT = "common_state/"


@dataclass(frozen=True, slots=True)
class StoredBytes:
    """Bytes [start, start + num_bytes) of a file of the checkpoint."""

    file: str
    start: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """A saved piece of a tensor, in the tensor's global coordinates; `stored` holds it as `torch.save` wrote it."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    stored: StoredBytes


@dataclass(frozen=True, slots=True)
class TorchDistTensor:
    """Global shape, dtype and chunks of one key."""

    key: str
    shape: tuple[int, ...]
    dtype: str
    """As safetensors names it."""
    chunks: tuple[Chunk, ...]

    @property
    def num_bytes(self) -> int:
        """Of its elements."""
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


@dataclass(frozen=True, slots=True)
class LocatedChunk:
    """The first element of a chunk lies at byte `start` of `file`; strides in bytes, one an axis."""

    file: Path
    start: int
    strides: tuple[int, ...]


class TorchDistReader:
    """One checkpoint. Errors are CheckpointErrors that name file and tensor."""

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        _check_backend(self.directory)
        index = load_index(_read_file(self.directory / INDEX), str(self.directory / INDEX))
        try:
            stored = self._stored(index)
            self.tensors: Mapping[str, TorchDistTensor] = _tensors(index, stored, self.directory / INDEX)
            self.objects: Mapping[str, StoredBytes] = _objects(index, stored)
        except (AttributeError, TypeError) as error:
            raise CheckpointError(f"{self.directory / INDEX} is damaged ({error}); get the checkpoint again") from error
        self._check_sizes(stored.values())
        self._paths: dict[str, Path] = {}
        self._located: dict[StoredBytes, LocatedChunk] = {}
        self._reader = SpanReader()

    def locate(self, tensor: TorchDistTensor, chunk: Chunk) -> LocatedChunk:
        """Where the chunk's elements lie; reads its header, once."""
        if chunk.stored not in self._located:
            self._located[chunk.stored] = self._open_chunk(tensor, chunk)
        return self._located[chunk.stored]

    def read_object(self, key: str) -> Any:
        """One of `objects`, as far as it is made of plain values; see `safe_pickle.load_common`."""
        stored = self.objects[key]
        buffer = np.empty(stored.num_bytes, dtype=np.uint8)
        self._reader.read_bytes(self.directory / stored.file, stored.start, buffer, key)
        return load_common(io.BytesIO(buffer.tobytes()), f"{self.directory / stored.file}: {key}")

    @cached_property
    def common(self) -> Mapping[str, Any]:
        """What was saved and is neither tensor nor sharded; empty when there is none. Megatron-LM's has `args` and `iteration`."""
        file = self.directory / COMMON
        keys = [key for key in self.objects if key.startswith(_COMMON_OBJECT)]
        if not keys and not file.is_file():
            return {}
        value = self.read_object(keys[0]) if keys else load_common(io.BytesIO(_read_file(file)), str(file))
        match value:
            case [dict(content)]:  # an object among the chunks is a list of what each rank holds of it
                return content
            case dict():
                return value
        raise CheckpointError(
            f"{self.directory}: the common state is a {type(value).__name__}, must be a dict; get the checkpoint again"
        )

    def close(self) -> None:
        """Close the files."""
        self._reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _path(self, file: str) -> Path:
        """One object a file: there may be a hundred thousand chunks."""
        if file not in self._paths:
            self._paths[file] = self.directory / file
        return self._paths[file]

    def _stored(self, index: Metadata) -> dict[tuple[str, tuple[int, ...] | None], StoredBytes]:
        """By key and offset, None for an object."""
        stored = {}
        for place, info in (index.storage_data or {}).items():
            if info.transform_descriptors:
                raise CheckpointError(
                    f"{self.directory}: {place.fqn} is stored with {info.transform_descriptors}; save the checkpoint uncompressed"
                )
            if os.sep in info.relative_path:
                raise CheckpointError(f"{self.directory / INDEX}: file {info.relative_path!r} lies outside of the checkpoint")
            offset = None if place.offset is None else tuple(place.offset)
            stored[place.fqn, offset] = StoredBytes(info.relative_path, info.offset, info.length)
        return stored

    def _check_sizes(self, stored: Any) -> None:
        ends: dict[str, int] = {}
        for item in stored:
            ends[item.file] = max(ends.get(item.file, 0), item.start + item.num_bytes)
        for file, end in sorted(ends.items()):
            try:
                size = (self.directory / file).stat().st_size
            except OSError as error:
                raise CheckpointError(
                    f"{self.directory / file} cannot be read ({error.strerror}); get the complete checkpoint"
                ) from error
            if size < end:
                raise CheckpointError(
                    f"{self.directory / file} has {size} bytes, the checkpoint needs {end} of it; it is truncated, get it again"
                )

    def _open_chunk(self, tensor: TorchDistTensor, chunk: Chunk) -> LocatedChunk:
        path = self._path(chunk.stored.file)
        what = f"{path}: {tensor.key} at {chunk.offset}"
        window = _Window(self._reader.descriptor(path), chunk.stored)
        archive = TorchArchive(cast(BinaryIO, window), what)
        described = load_tensor_description(archive.read("data.pkl"), what)
        start, num_bytes = archive.place(f"data/{described.record}")
        extent = 1 + sum((size - 1) * stride for size, stride in zip(described.shape, described.strides, strict=True))
        itemsize = ITEMSIZE[tensor.dtype]
        needed = (described.offset + extent) * itemsize
        stored = (DTYPES.get(described.dtype), described.shape)
        if stored != (tensor.dtype, chunk.shape):
            raise CheckpointError(f"{what} is {stored}, the index says {(tensor.dtype, chunk.shape)}; get the checkpoint again")
        if num_bytes < needed or start + num_bytes > chunk.stored.num_bytes or not archive.is_little_endian:
            raise CheckpointError(f"{what} is damaged (no {needed} bytes of elements); get the checkpoint again")
        strides = tuple(stride * itemsize for stride in described.strides)
        first = chunk.stored.start + start + described.offset * itemsize
        return LocatedChunk(path, first, strides)


class _Window(io.RawIOBase):
    """Part of a file as a file, by `pread`: threads may share the descriptor."""

    def __init__(self, descriptor: int, stored: StoredBytes):
        super().__init__()
        self._descriptor, self._stored, self._position = descriptor, stored, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._stored.num_bytes}[whence]
        if base + offset < 0:
            raise ValueError("a position before the start")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        wanted = max(min(len(buffer), self._stored.num_bytes - self._position), 0)
        count = os.preadv(self._descriptor, [memoryview(buffer)[:wanted]], self._stored.start + self._position)
        self._position += count
        return count


def is_torch_dist(directory: Path) -> bool:
    """Whether a torch_dist checkpoint was saved there, complete or not."""
    return (directory / CONFIG).is_file() or (directory / INDEX).is_file()


def _check_backend(directory: Path) -> None:
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is no folder; give a torch_dist checkpoint")
    try:
        backend = json.loads((directory / CONFIG).read_text())["sharded_backend"]
    except FileNotFoundError:
        raise CheckpointError(f"{directory / CONFIG} is missing: the save was not completed; use another checkpoint") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{directory / CONFIG} is damaged ({error}); get the checkpoint again") from error
    if backend != _BACKEND:
        raise CheckpointError(f"{directory} is saved as {backend!r}, must be {_BACKEND!r}; save it with --ckpt-format torch_dist")


def _tensors(
    index: Metadata, stored: Mapping[tuple[str, tuple[int, ...] | None], StoredBytes], file: Path
) -> dict[str, TorchDistTensor]:
    tensors = {}
    for key, value in index.state_dict_metadata.items():
        if not isinstance(value, TensorMetadata):
            continue
        chunks = []
        for chunk in value.chunks:
            offset, shape = tuple(chunk.offsets), tuple(chunk.sizes)
            if (key, offset) not in stored:
                raise CheckpointError(f"{file} places the chunk of {key} at {offset} in no file; get the checkpoint again")
            chunks.append(Chunk(offset, shape, stored[key, offset]))
        dtype = value.properties.dtype
        if dtype not in DTYPES:
            raise CheckpointError(f"{file}: {key} is {dtype}, must be one of {', '.join(DTYPES)}; save it as one of them")
        tensors[key] = TorchDistTensor(key, tuple(value.size), DTYPES[dtype], tuple(chunks))
    return tensors


def _objects(index: Metadata, stored: Mapping[tuple[str, tuple[int, ...] | None], StoredBytes]) -> dict[str, StoredBytes]:
    """What is saved beside the tensors, pickled: random streams, TransformerEngine's `_extra_state`, the common state."""
    keys = [key for key, value in index.state_dict_metadata.items() if isinstance(value, BytesMetadata)]
    return {key: stored[key, None] for key in keys if (key, None) in stored}


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); get the complete checkpoint") from error
