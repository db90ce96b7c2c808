"""The bytes that torch.save puts before and after the elements of one tensor.

A torch_dist file is a row of such archives. Writing the frame apart from the elements lets them go from file to file through one
buffer, without torch. As with `torch.serialization.set_crc32_options(False)` the checksums are zero: torch.load ignores them, and the
manifest holds a hash of every tensor.
"""

from __future__ import annotations

import math
import pickle
import struct
from dataclasses import dataclass

_STORAGES = {
    "BF16": ("BFloat16Storage", 2),
    "F16": ("HalfStorage", 2),
    "F32": ("FloatStorage", 4),
    "F64": ("DoubleStorage", 8),
}
"""dtype as safetensors writes it -> torch's storage class, bytes an element."""
_LOCAL, _CENTRAL, _END = 0x04034B50, 0x02014B50, 0x06054B50
_UTF8_NAMES = 0x800
_EARLIEST_DATE = 0x21
"""1 January 1980: zip has no earlier, and an archive should depend on its content alone."""


def item_size(dtype: str) -> int:
    """Bytes an element."""
    return _STORAGES[dtype][1]


@dataclass(frozen=True, slots=True)
class Frame:
    """`before` + elements, row-major + `after` is what torch.load reads as one tensor."""

    before: bytes
    after: bytes


def frame(dtype: str, shape: tuple[int, ...]) -> Frame:
    """The frame of a contiguous CPU tensor; `dtype` as safetensors writes it, one of BF16, F16, F32, F64."""
    num_bytes = math.prod(shape) * item_size(dtype)
    before, directory = b"", b""
    files = [("data.pkl", _pickled(dtype, shape)), ("byteorder", b"little"), ("version", b"3\n"), ("data/0", None)]
    for name, content in files:
        path = f"archive/{name}".encode()
        size = num_bytes if content is None else len(content)
        fields = struct.pack("<HHHHHIIIHH", 0, _UTF8_NAMES, 0, 0, _EARLIEST_DATE, 0, size, size, len(path), 0)
        directory += struct.pack("<IH", _CENTRAL, 0) + fields + struct.pack("<HHHII", 0, 0, 0, 0, len(before)) + path
        before += struct.pack("<I", _LOCAL) + fields + path + (content or b"")
    end = struct.pack("<IHHHHIIH", _END, 0, 0, len(files), len(files), len(directory), len(before) + num_bytes, 0)
    return Frame(before, directory + end)


def _pickled(dtype: str, shape: tuple[int, ...]) -> bytes:
    """What torch pickles for a tensor: a call of _rebuild_tensor_v2 on storage "0"."""
    strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    storage = _ops("storage") + b"ctorch\n%s\n" % _STORAGES[dtype][0].encode() + _ops("0") + _ops("cpu") + _ops(math.prod(shape))
    arguments = b"((" + storage + b"tQ" + _ops(0) + _ops(shape) + _ops(strides) + _ops(False) + b"ccollections\nOrderedDict\n)Rt"
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"R."


def _ops(value: object) -> bytes:
    """The pickle opcodes that push a value."""
    return pickle.dumps(value, protocol=2)[2:-1]
