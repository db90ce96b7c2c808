"""Two tensors compared bit by bit, in bands of rows: the part of `verify` that runs in worker processes.

Imports torch only for what plain bytes cannot give (FP8 weights, pytorch_model.bin).
"""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from checkpoint_tools.spans import ITEMSIZE, SpanReader, SpanTensor
from checkpoint_tools.worker_pool import Report
from dapo_megatron.weights.hf_headers import TORCH_DTYPES

_MAX_BAND_BYTES = 4 * 2**20
_COPIES_AT_ONCE = 8
"""Two tensors, the bytes they were read from, and both in fp64 where they differ."""


@dataclass(frozen=True, slots=True)
class SpanRows:
    """A tensor that is read by its places. `narrow`: it is saved in F32 and holds BF16 values, and is compared as such."""

    tensor: SpanTensor
    narrow: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def dtype(self) -> str:
        return "BF16" if self.narrow else self.tensor.dtype


@dataclass(frozen=True, slots=True)
class HfRows:
    """A tensor that the library has to read: dequantised, or out of a pickle. `dtype`: as it comes out."""

    directory: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


Rows = SpanRows | HfRows
_KINDS = {
    "F16": "f2",
    "F32": "f4",
    "F64": "f8",
    "BOOL": "u1",
    "U8": "u1",
    "I8": "i1",
    "U16": "u2",
    "I16": "i2",
    "U32": "u4",
    "I32": "i4",
    "U64": "u8",
    "I64": "i8",
}
"""dtype as safetensors names it -> numpy's name, where it has one."""


@dataclass(frozen=True, slots=True)
class CompareTask:
    """Two tensors of one name; shapes are equal."""

    name: str
    a: Rows
    b: Rows

    @property
    def num_bytes(self) -> int:
        return int(np.prod(self.a.shape, dtype=np.int64)) * (ITEMSIZE[self.a.dtype] + ITEMSIZE[self.b.dtype])


@dataclass(frozen=True, slots=True)
class Comparison:
    """Of one tensor. Index and values belong to the first element that differs, in row-major order."""

    xxh3_a: str
    xxh3_b: str
    """xxh3_128 of each side's row-major bytes, in hex."""
    num_differing: int = 0
    first_index: tuple[int, ...] | None = None
    first_a: float | None = None
    first_b: float | None = None
    max_difference: float = 0.0
    """Largest absolute difference; nan where one side is nan and the other is not."""
    equal_when_rounded: bool = True
    """Where dtypes differ: the wider side, rounded to the narrower dtype, is the narrower side."""


class CompareWorker:
    """Its records are `Comparison`s as dicts."""

    def __init__(self, memory_bytes: int) -> None:
        self._band_bytes = min(memory_bytes // _COPIES_AT_ONCE, _MAX_BAND_BYTES)
        self._reader = SpanReader()
        self._memory = tuple(np.empty(self._band_bytes, dtype=np.uint8) for _ in "ab")

    def work(self, task: CompareTask, report: Report) -> dict[str, Any]:
        """Read both tensors to the end."""
        rows, columns = (task.a.shape[0] if task.a.shape else 1), int(np.prod(task.a.shape[1:], dtype=np.int64))
        itemsize = max(ITEMSIZE[task.a.dtype], ITEMSIZE[task.b.dtype])
        rows_at_once = max(1, self._band_bytes // max(1, columns * itemsize))
        hashes = xxhash.xxh3_128(), xxhash.xxh3_128()
        total = Comparison("", "")
        for row0 in range(0, rows, rows_at_once):
            row1 = min(row0 + rows_at_once, rows)
            a, b = (self._read(*side, row0, row1) for side in zip((task.a, task.b), self._memory, strict=True))
            for running, band in zip(hashes, (a, b), strict=True):
                running.update(band)
            if task.a.dtype != task.b.dtype or not np.array_equal(a, b):
                total = _add(total, a, task.a.dtype, b, task.b.dtype, row0, task.a.shape)
            report(a.nbytes + b.nbytes)
        return {**asdict(total), "xxh3_a": hashes[0].hexdigest(), "xxh3_b": hashes[1].hexdigest()}

    def check(self, task: CompareTask, record: Any, report: Report) -> bool:
        """Nothing is kept between runs."""
        return False

    def _read(self, side: Rows, memory: np.ndarray, row0: int, row1: int) -> np.ndarray:
        if isinstance(side, HfRows):
            return _read_hf(side, row0, row1)
        rows = self._reader.read_rows(side.tensor, row0, row1, memory)
        return (rows >> 16).astype(np.uint16) if side.narrow else rows


def as_numbers(raw: np.ndarray, dtype: str) -> np.ndarray:
    """Raw elements as fp64 (64-bit integers are rounded)."""
    match dtype:
        case "BF16":
            return (raw.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        case "F8_E4M3" | "F8_E5M2":
            import torch

            numbers: np.ndarray = torch.from_numpy(raw).view(getattr(torch, TORCH_DTYPES[dtype])).double().numpy()
            return numbers
    return raw.view(_KINDS[dtype]).astype(np.float64)


def round_to(numbers: np.ndarray, dtype: str) -> np.ndarray:
    """fp64 rounded to a float dtype (to nearest, ties to even), as fp64; unchanged for other dtypes."""
    match dtype:
        case "BF16":
            bits = numbers.astype(np.float32).view(np.uint32)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
            return np.where(np.isnan(numbers), numbers, rounded.view(np.float32).astype(np.float64))
        case "F16" | "F32":
            return numbers.astype(np.float16 if dtype == "F16" else np.float32).astype(np.float64)
    return numbers


def _add(
    total: Comparison, a: np.ndarray, dtype_a: str, b: np.ndarray, dtype_b: str, row0: int, shape: tuple[int, ...]
) -> Comparison:
    """The comparison with one more band, of rows from `row0` on."""
    x, y = as_numbers(a, dtype_a), as_numbers(b, dtype_b)
    with np.errstate(invalid="ignore", over="ignore"):
        if dtype_a == dtype_b:
            differs, rounded = a != b, False
        else:
            differs = ~((x == y) | (np.isnan(x) & np.isnan(y)))
            wide, narrow, narrow_dtype = (x, y, dtype_b) if ITEMSIZE[dtype_a] > ITEMSIZE[dtype_b] else (y, x, dtype_a)
            rounded = np.array_equal(round_to(wide, narrow_dtype), narrow, equal_nan=True)
        if not differs.any():
            return total
        distance = np.abs(x - y)[differs & ~(x == y)]
    first = int(np.flatnonzero(differs.reshape(-1))[0])
    is_first = total.first_index is None
    index = tuple(int(i) for i in np.unravel_index(row0 * a.shape[1] + first, shape)) if shape else ()
    return Comparison(
        *("", ""),
        num_differing=total.num_differing + int(differs.sum()),
        first_index=index if is_first else total.first_index,
        first_a=float(x.reshape(-1)[first]) if is_first else total.first_a,
        first_b=float(y.reshape(-1)[first]) if is_first else total.first_b,
        max_difference=float(np.max(distance, initial=total.max_difference)),
        equal_when_rounded=total.equal_when_rounded and rounded,
    )


def _read_hf(side: HfRows, row0: int, row1: int) -> np.ndarray:
    import torch

    slices = (slice(row0, row1), *(slice(0, size) for size in side.shape[1:])) if side.shape else None
    tensor = _hf_files(side.directory).read(side.name, slices).contiguous()
    raw = tensor.reshape(-1).view(torch.uint8).numpy().view(f"u{ITEMSIZE[side.dtype]}")
    return raw.reshape(row1 - row0, -1)


@functools.cache
def _hf_files(directory: Path) -> Any:
    from dapo_megatron.weights.hf_files import HfFiles

    return HfFiles(directory)
