"""Archives as torch.save writes them, without torch.

A torch_dist file is a row of them, each with one tensor. Written apart from its elements, the frame of an archive lets them go from
file to file through one buffer. As with `torch.serialization.set_crc32_options(False)` the checksums are zero: torch.load does not look
at them, and the manifest has a hash of every tensor.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Any

from checkpoint_tools.pickle_writer import Call, External, Name, pickled
from dapo_megatron.weights.hf_headers import ITEMSIZE

_STORAGES = {"BF16": "BFloat16Storage", "F16": "HalfStorage", "F32": "FloatStorage", "F64": "DoubleStorage"}
"""dtype as safetensors writes it -> torch's storage class."""
_LOCAL, _CENTRAL, _END = 0x04034B50, 0x02014B50, 0x06054B50
_UTF8_NAMES = 0x800
_EARLIEST_DATE = 0x21
"""1 January 1980: zip has no earlier, and an archive should depend on its content alone."""


@dataclass(frozen=True, slots=True)
class Frame:
    """`before` + elements, row-major + `after` is what torch.load reads as one tensor."""

    before: bytes
    after: bytes


def frame(dtype: str, shape: tuple[int, ...]) -> Frame:
    """The frame of a contiguous CPU tensor; `dtype` as safetensors writes it, one of BF16, F16, F32, F64."""
    num_elements = math.prod(shape)
    strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    storage = External(("storage", Name("torch", _STORAGES[dtype]), "0", "cpu", num_elements))
    no_hooks = Call(Name("collections", "OrderedDict"), ())
    tensor = Call(Name("torch._utils", "_rebuild_tensor_v2"), (storage, 0, shape, strides, False, no_hooks))
    return _frame(pickled(tensor), num_elements * ITEMSIZE[dtype])


def archive(value: Any) -> bytes:
    """An archive of an object without tensors, as `pickle_writer` describes it."""
    around = _frame(pickled(value), None)
    return around.before + around.after


def _frame(pickle: bytes, num_bytes: int | None) -> Frame:
    """Around the one storage of so many bytes, if there is one; it is the last record."""
    records: list[tuple[str, bytes | None]] = [("data.pkl", pickle), ("byteorder", b"little"), ("version", b"3\n")]
    if num_bytes is not None:
        records.append(("data/0", None))
    before, directory = b"", b""
    for name, content in records:
        path = f"archive/{name}".encode()
        size = len(content) if content is not None else num_bytes
        fields = struct.pack("<HHHHHIIIHH", 0, _UTF8_NAMES, 0, 0, _EARLIEST_DATE, 0, size, size, len(path), 0)
        directory += struct.pack("<IH", _CENTRAL, 0) + fields + struct.pack("<HHHII", 0, 0, 0, 0, len(before)) + path
        before += struct.pack("<I", _LOCAL) + fields + path + (content or b"")
    start = len(before) + (num_bytes or 0)
    return Frame(before, directory + struct.pack("<IHHHHIIH", _END, 0, 0, len(records), len(records), len(directory), start, 0))
