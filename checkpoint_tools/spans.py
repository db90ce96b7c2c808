"""Tensors as places in files: read by rows with plain `pread`, without torch, in any process.

A tensor of any rank is a matrix here: rows are its first axis, columns all others flattened; a vector has one column. Elements are
unsigned integers of their width: nothing is computed with them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dapo_megatron.types import CheckpointError
from dapo_megatron.weights.hf_headers import ITEMSIZE

_UNSIGNED: dict[int, np.dtype] = {1: np.dtype("u1"), 2: np.dtype("<u2"), 4: np.dtype("<u4"), 8: np.dtype("<u8")}


@dataclass(frozen=True, slots=True)
class Span:
    """Rows [row0, row0 + rows) x columns [column0, column0 + columns) of a tensor lie in `file` from byte `start` on.

    Strides are the bytes from one row, or column, to the next in the file.
    """

    file: Path
    start: int
    row_stride: int
    column_stride: int
    row0: int
    rows: int
    column0: int
    columns: int

    def extent(self, rows: int, itemsize: int) -> int:
        """Bytes from the first to behind the last element of so many of its rows."""
        return (rows - 1) * self.row_stride + (self.columns - 1) * self.column_stride + itemsize


@dataclass(frozen=True, slots=True)
class SpanTensor:
    """A tensor and where its elements lie: `spans`, sorted by row0, cover it exactly once. `dtype` as safetensors names it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    spans: tuple[Span, ...]

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.dtype]

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def columns(self) -> int:
        return math.prod(self.shape[1:])

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.itemsize

    def bands(self, band_bytes: int) -> Iterator[tuple[int, int]]:
        """Row ranges that take at most `band_bytes` here and in the files (at least one row), and cover the tensor in order."""
        widest = max((span.row_stride for span in self.spans), default=0)
        rows_at_once = max(1, band_bytes // max(1, self.columns * self.itemsize, widest))
        for row0 in range(0, self.rows, rows_at_once):
            yield row0, min(row0 + rows_at_once, self.rows)


class SpanReader:
    """Reads rows of span tensors; keeps files open until closed."""

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}

    def read_rows(self, tensor: SpanTensor, row0: int, row1: int, memory: np.ndarray | None = None) -> np.ndarray:
        """Rows [row0, row1) as unsigned integers, (rows, columns), contiguous. CheckpointError when a file ends too early.

        `memory`, uint8, is where they are put if they fit: fresh memory costs more than reading into it.
        """
        itemsize, shape = tensor.itemsize, (row1 - row0, tensor.columns)
        num_bytes = math.prod(shape) * itemsize
        if memory is None or num_bytes > memory.nbytes:
            memory = np.empty(num_bytes, dtype=np.uint8)
        result = memory[:num_bytes].view(_UNSIGNED[itemsize]).reshape(shape)
        num_elements = 0
        for span in tensor.spans:
            first, last = max(row0, span.row0), min(row1, span.row0 + span.rows)
            if first >= last:
                continue
            target = result[first - row0 : last - row0, span.column0 : span.column0 + span.columns]
            start = span.start + (first - span.row0) * span.row_stride
            extent = span.extent(last - first, itemsize)
            lies_alike = span.columns == tensor.columns and extent == target.nbytes and span.column_stride == itemsize
            if lies_alike:
                self.read_bytes(span.file, start, target.reshape(-1).view(np.uint8), tensor.name)
            else:
                buffer = np.empty(extent, dtype=np.uint8)
                self.read_bytes(span.file, start, buffer, tensor.name)
                strides = (span.row_stride, span.column_stride)
                target[:] = np.ndarray(target.shape, result.dtype, buffer.data, strides=strides)
            num_elements += target.size
        if num_elements != result.size:
            raise CheckpointError(f"{tensor.name}: rows {row0}:{row1} are not saved completely; get the checkpoint again")
        return result

    def read_bytes(self, file: Path, start: int, buffer: np.ndarray, what: str) -> None:
        """Fill a uint8 array from the file. CheckpointError names `what` when the file ends before."""
        view, num_read = memoryview(buffer), 0
        while num_read < len(view):
            try:
                count = os.preadv(self.descriptor(file), [view[num_read:]], start + num_read)
            except OSError as error:
                raise CheckpointError(f"{file} cannot be read ({error.strerror}), within {what}") from error
            if count == 0:
                raise CheckpointError(f"{file} ends within {what}; it is truncated, get it again")
            num_read += count

    def descriptor(self, file: Path) -> int:
        """Of the file, opened once."""
        if file not in self._descriptors:
            try:
                self._descriptors[file] = os.open(file, os.O_RDONLY)
            except OSError as error:
                raise CheckpointError(f"{file} cannot be read ({error.strerror}); get the complete checkpoint") from error
        return self._descriptors[file]

    def close(self) -> None:
        """Close the files."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()


def whole_span(file: Path, start: int, shape: Sequence[int], dtype: str) -> Span:
    """Of a tensor that lies in one piece, row after row, as in a safetensors file."""
    rows, columns = (shape[0] if shape else 1), math.prod(shape[1:])
    return Span(file, start, columns * ITEMSIZE[dtype], ITEMSIZE[dtype], 0, rows, 0, columns)
