"""The part of megatron-to-hf that runs in worker processes: read a tensor's rows, hash them, write them where the plan says.

Imports no torch.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from checkpoint_tools.errors import writing
from checkpoint_tools.spans import SpanReader, SpanTensor, whole_span
from checkpoint_tools.worker_pool import Report
from dapo_megatron.types import CheckpointError

_MAX_BAND_BYTES = 4 * 2**20
"""Fits the processor's caches between reading, hashing and writing."""
_COPIES_AT_ONCE = 3
"""The rows, the bytes they were read from when these lie apart, and room for the file system's call."""
MAX_BUFFER_BYTES = _MAX_BAND_BYTES * _COPIES_AT_ONCE
"""Of one worker, whatever it may have."""


@dataclass(frozen=True, slots=True)
class ExportTask:
    """One HF tensor: its bytes go to `file` from `offset` on, row after row.

    `narrow`: it is saved in F32, and becomes the BF16 that it was before; megatron-core keeps some tensors in F32.
    """

    tensor: SpanTensor
    file: Path
    offset: int
    narrow: bool = False

    @property
    def name(self) -> str:
        return self.tensor.name

    @property
    def num_bytes(self) -> int:
        return self.tensor.num_bytes // (2 if self.narrow else 1)


class ExportWorker:
    """Its records are the xxh3_128 of the tensor's bytes, in hex."""

    def __init__(self, memory_bytes: int) -> None:
        self._band_bytes = min(memory_bytes // _COPIES_AT_ONCE, _MAX_BAND_BYTES)
        self._reader = SpanReader()
        self._memory = np.empty(self._band_bytes, dtype=np.uint8)
        self._targets: dict[Path, int] = {}

    def work(self, task: ExportTask, report: Report) -> str:
        """Copy the tensor."""
        running, offset = xxhash.xxh3_128(), task.offset
        for row0, row1 in task.tensor.bands(self._band_bytes):
            rows = self._reader.read_rows(task.tensor, row0, row1, self._memory)
            if task.narrow:
                rows = _narrowed(rows, task.name)
            running.update(rows)
            self._write(task.file, offset, rows)
            offset += rows.nbytes
            report(rows.nbytes)
        return running.hexdigest()

    def check(self, task: ExportTask, record: str, report: Report) -> bool:
        """Whether the file holds the bytes of that hash."""
        shape, dtype = task.tensor.shape, "BF16" if task.narrow else task.tensor.dtype
        written = SpanTensor(task.name, shape, dtype, (whole_span(task.file, task.offset, shape, dtype),))
        return hash_tensor(self._reader, written, self._band_bytes, report) == record

    def _write(self, file: Path, offset: int, rows: np.ndarray) -> None:
        view = memoryview(rows.reshape(-1).view(np.uint8))
        with writing(file):
            if file not in self._targets:
                self._targets[file] = os.open(file, os.O_WRONLY)
            written = 0
            while written < len(view):
                written += os.pwrite(self._targets[file], view[written:], offset + written)


def _narrowed(rows: np.ndarray, name: str) -> np.ndarray:
    """F32 as BF16. CheckpointError when that would round."""
    if (rows & 0xFFFF).any():
        raise CheckpointError(
            f"{name} was BF16 by the manifest, and has values now that BF16 cannot hold; remove the manifest to export F32"
        )
    return (rows >> 16).astype(np.uint16)


def hash_tensor(reader: SpanReader, tensor: SpanTensor, band_bytes: int, report: Report) -> str:
    """xxh3_128 of a tensor's row-major bytes, in hex."""
    running = xxhash.xxh3_128()
    for row0, row1 in tensor.bands(band_bytes):
        rows = reader.read_rows(tensor, row0, row1)
        running.update(rows)
        report(rows.nbytes)
    return running.hexdigest()
