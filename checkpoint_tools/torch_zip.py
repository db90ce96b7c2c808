"""Archives as torch.save writes them, without torch.

A torch_dist file is a row of them, each with one tensor; a legacy file is one with many. Planned apart from its elements, an archive lets
them go from file to file through one buffer. As with `torch.serialization.set_crc32_options(False)` the checksums are zero: torch.load
does not look at them, and the manifest has a hash of every tensor.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from checkpoint_tools.pickle_writer import Call, External, Name, pickled
from dapo_megatron.weights.hf_headers import ITEMSIZE

STORAGES = {"BF16": "BFloat16Storage", "F16": "HalfStorage", "F32": "FloatStorage", "F64": "DoubleStorage"}
"""dtype as safetensors writes it -> torch's storage class."""
TENSOR_ALIGNMENT = 64
"""torch.save's own, for those who map a file into memory."""
_LOCAL, _CENTRAL, _END, _END_64, _LOCATOR_64 = 0x04034B50, 0x02014B50, 0x06054B50, 0x06064B50, 0x07064B50
_UTF8_NAMES = 0x800
_EARLIEST_DATE = 0x21
"""1 January 1980: zip has no earlier, and an archive should depend on its content alone."""
_SIZES_64, _PADDING = 1, 0x4246
"""Extra fields: sizes that 32 bits cannot hold; nothing, as torch.save names it."""
_TOO_BIG, _TOO_MANY = 0xFFFFFFFF, 0xFFFF
_VERSION_64 = 45


@dataclass(frozen=True, slots=True)
class Frame:
    """`before` + elements, row-major + `after` is what torch.load reads as one tensor."""

    before: bytes
    after: bytes


@dataclass(frozen=True, slots=True)
class ArchivePlan:
    """An archive of `num_bytes`: `pieces` are (place, bytes), `starts` are the places of the tensors' elements between them."""

    pieces: tuple[tuple[int, bytes], ...]
    starts: tuple[int, ...]
    num_bytes: int


def frame(dtype: str, shape: tuple[int, ...]) -> Frame:
    """The frame of a contiguous CPU tensor; `dtype` as safetensors writes it, one of `STORAGES`."""
    plan = plan_archive(tensor(0, dtype, shape), [math.prod(shape) * ITEMSIZE[dtype]])
    before = b"".join(content for place, content in plan.pieces if place < plan.starts[0])
    return Frame(before, plan.pieces[-1][1])


def archive(value: Any) -> bytes:
    """An archive of an object without tensors, as `pickle_writer` describes it."""
    return b"".join(content for _, content in plan_archive(value, []).pieces)


def tensor(number: int, dtype: str, shape: tuple[int, ...]) -> Call:
    """A contiguous CPU tensor inside of an archived object; its elements are record `number`."""
    num_elements = math.prod(shape)
    strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    storage = External(("storage", Name("torch", STORAGES[dtype]), str(number), "cpu", num_elements))
    no_hooks = Call(Name("collections", "OrderedDict"), ())
    return Call(Name("torch._utils", "_rebuild_tensor_v2"), (storage, 0, shape, strides, False, no_hooks))


def plan_archive(value: Any, sizes: Sequence[int], alignment: int = 1) -> ArchivePlan:
    """An archive of `value`, whose tensors have numbers from 0 on and `sizes` bytes each, starting at multiples of `alignment`."""
    contents = {"data.pkl": pickled(value), "byteorder": b"little", "version": b"3\n"}
    pieces: list[tuple[int, bytes]] = []
    starts: list[int] = []
    directory, place = b"", 0
    for name, content in [*contents.items(), *((f"data/{number}", None) for number in range(len(sizes)))]:
        path = f"archive/{name}".encode()
        size = len(content) if content is not None else sizes[len(starts)]
        sizes_64 = struct.pack("<HHQQ", _SIZES_64, 16, size, size) if size >= _TOO_BIG else b""
        head_bytes = 30 + len(path) + len(sizes_64)
        extra = sizes_64 + (_padding(place + head_bytes, alignment) if content is None else b"")
        pieces.append((place, struct.pack("<I", _LOCAL) + _fields(path, size, extra) + path + extra + (content or b"")))
        directory += _directory_entry(path, size, place)
        start = place + 30 + len(path) + len(extra)
        if content is None:
            starts.append(start)
        place = start + size
    num_records = len(contents) + len(sizes)
    pieces.append((place, directory + _end(num_records, len(directory), place)))
    return ArchivePlan(tuple(pieces), tuple(starts), place + len(pieces[-1][1]))


def _padding(place: int, alignment: int) -> bytes:
    """An extra field that moves what follows it to a multiple of `alignment`."""
    if place % alignment == 0:
        return b""
    num_bytes = -(place + 4) % alignment
    return struct.pack("<HH", _PADDING, num_bytes) + bytes(num_bytes)


def _fields(path: bytes, size: int, extra: bytes) -> bytes:
    """What the two headers of a record have in common."""
    version, size = (_VERSION_64, _TOO_BIG) if size >= _TOO_BIG else (0, size)
    return struct.pack("<HHHHHIIIHH", version, _UTF8_NAMES, 0, 0, _EARLIEST_DATE, 0, size, size, len(path), len(extra))


def _directory_entry(path: bytes, size: int, place: int) -> bytes:
    numbers = ([size, size] if size >= _TOO_BIG else []) + ([place] if place >= _TOO_BIG else [])
    extra = struct.pack(f"<HH{len(numbers)}Q", _SIZES_64, 8 * len(numbers), *numbers) if numbers else b""
    fields = struct.pack("<IH", _CENTRAL, 0) + _fields(path, size, extra)
    return fields + struct.pack("<HHHII", 0, 0, 0, 0, min(place, _TOO_BIG)) + path + extra


def _end(num_records: int, directory_bytes: int, place: int) -> bytes:
    """What follows the directory of an archive, which lies at `place`."""
    end_64 = b""
    if max(place, directory_bytes) >= _TOO_BIG or num_records >= _TOO_MANY:
        versions, counts = (_VERSION_64, _VERSION_64), (num_records, num_records)
        end_64 = struct.pack("<IQHHIIQQQQ", _END_64, 44, *versions, 0, 0, *counts, directory_bytes, place)
        end_64 += struct.pack("<IIQI", _LOCATOR_64, 0, place + directory_bytes, 1)
    count = min(num_records, _TOO_MANY)
    sizes = min(directory_bytes, _TOO_BIG), min(place, _TOO_BIG)
    return end_64 + struct.pack("<IHHHHIIH", _END, 0, 0, count, count, *sizes, 0)
