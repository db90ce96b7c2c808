"""What a worker of hf-to-megatron does: rows from HF files through one buffer into their place in a .distcp file, hashed on the way.

Rows that keep their dtype are bytes to it. Only a change of dtype, or an FP8 weight, loads torch.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from checkpoint_tools.errors import reading, writing
from checkpoint_tools.file_cache import FileCache, write_all
from checkpoint_tools.import_plan import Chunk, ImportTask, SourceRun
from checkpoint_tools.worker_pool import Report
from dapo_megatron.types import CheckpointError
from dapo_megatron.weights.hf_files import HfFiles
from dapo_megatron.weights.hf_headers import TORCH_DTYPES
from dapo_megatron.weights.pread import read_into

if TYPE_CHECKING:
    import torch

BUFFER_BYTES = 4 * 2**20
"""At most: what is read is still in the processor's cache when it is hashed and written."""
_CAST_COPIES = 8
"""Buffers that a cast may need besides its own: torch holds the rows in up to three dtypes, one of them fp32."""

Record = dict[str, str]
"""HF name -> xxh3_128 in hex of what the checkpoint holds of it: all its rows, in the manifest's dtype."""


class ImportWorker:
    """`source` is the HF directory, `target` the folder of the .distcp files; `memory_bytes` bounds the buffers."""

    def __init__(self, source: Path, target: Path, memory_bytes: int) -> None:
        self._source, self._target = source, target
        self._memory_bytes = memory_bytes
        self._files = FileCache()
        self._buffer = memoryview(bytearray(0))

    def work(self, task: ImportTask, report: Report) -> Record:
        """Write the tensor's chunks; the record holds the hashes of its HF tensors."""
        hashes: dict[str, xxhash.xxh3_128] = defaultdict(xxhash.xxh3_128)
        path = self._target / task.file
        with writing(path):
            file = self._files.open(path, os.O_RDWR)
            for chunk in task.chunks:
                around, at = task.frame(chunk), chunk.offset
                write_all(file, around.before, at)
                at += len(around.before)
                for row0, rows in self._blocks(task, chunk):
                    for run, first_row, part in self._parts(task, row0, rows):
                        self._read(task, run, first_row, part, hashes[run.hf_name])
                    write_all(file, rows, at)
                    at += len(rows)
                    report(len(rows))
                write_all(file, around.after, at)
        return {name: running.hexdigest() for name, running in hashes.items()}

    def check(self, task: ImportTask, record: Record, report: Report) -> bool:
        """Whether the file has the frames of these chunks and, between them, elements with these hashes."""
        hashes: dict[str, xxhash.xxh3_128] = defaultdict(xxhash.xxh3_128)
        path = self._target / task.file
        with reading(path):
            file = self._files.open(path, os.O_RDWR)
            for chunk in task.chunks:
                around, at = task.frame(chunk), chunk.offset
                if os.pread(file, len(around.before), at) != around.before:
                    return False
                at += len(around.before)
                for row0, rows in self._blocks(task, chunk):
                    if read_into(file, rows, at) != len(rows):
                        return False
                    for run, _, part in self._parts(task, row0, rows):
                        hashes[run.hf_name].update(self._cast(part, task.dtype, task.hf_dtype))
                    at += len(rows)
                if os.pread(file, len(around.after), at) != around.after:
                    return False
        if {name: running.hexdigest() for name, running in hashes.items()} != record:
            return False
        report(task.num_bytes)
        return True

    def _blocks(self, task: ImportTask, chunk: Chunk) -> Iterator[tuple[int, memoryview]]:
        """(first row in the tensor, buffer for some rows), through the chunk."""
        is_cast = any(not task.is_plain(run) for run in task.runs)
        wanted = min(BUFFER_BYTES, self._memory_bytes // (_CAST_COPIES if is_cast else 1))
        rows_at_once = max(1, wanted // task.row_bytes)
        if len(self._buffer) < rows_at_once * task.row_bytes:
            self._buffer = memoryview(bytearray(rows_at_once * task.row_bytes))
        for row0 in range(chunk.row0, chunk.row0 + chunk.rows, rows_at_once):
            rows = min(rows_at_once, chunk.row0 + chunk.rows - row0)
            yield row0, self._buffer[: rows * task.row_bytes]

    def _parts(self, task: ImportTask, row0: int, block: memoryview) -> Iterator[tuple[SourceRun, int, memoryview]]:
        """The block cut by runs: (run, first row within the run, its part of the block)."""
        row1 = row0 + len(block) // task.row_bytes
        for run in task.runs:
            start, stop = max(run.mcore_row0, row0), min(run.mcore_row0 + run.rows, row1)
            if start < stop:
                yield run, start - run.mcore_row0, block[(start - row0) * task.row_bytes : (stop - row0) * task.row_bytes]

    def _read(self, task: ImportTask, run: SourceRun, first_row: int, part: memoryview, running: xxhash.xxh3_128) -> None:
        """Fill `part` with rows of the run, from `first_row` of it on, and hash them as the manifest's dtype has them."""
        if task.is_plain(run):
            path = self._source / run.file
            with reading(path):
                file = self._files.open(path, os.O_RDONLY)
                num_read = read_into(file, part, run.offset + first_row * task.row_bytes)
            if num_read != len(part):
                raise CheckpointError(f"{path} ends within {run.hf_name}: it is truncated; get the file again")
            running.update(part)
            return
        row0 = run.hf_row0 + first_row
        rows = slice(row0, row0 + len(part) // task.row_bytes)
        values = self._hf_files.read(run.hf_name, (rows, *(slice(0, size) for size in task.shape[1:])))
        values = values.to(_torch_dtype(task.hf_dtype))
        running.update(_bytes_of(values))
        part[:] = _bytes_of(values.to(_torch_dtype(task.dtype)))

    def _cast(self, part: memoryview, dtype: str, wanted: str) -> memoryview:
        if dtype == wanted:
            return part
        import torch

        return _bytes_of(torch.frombuffer(part, dtype=_torch_dtype(dtype)).to(_torch_dtype(wanted)))

    @cached_property
    def _hf_files(self) -> HfFiles:
        import torch

        torch.set_num_threads(1)
        return HfFiles(self._source)


def _torch_dtype(dtype: str) -> torch.dtype:
    import torch

    found: torch.dtype = getattr(torch, TORCH_DTYPES[dtype])
    return found


def _bytes_of(values: torch.Tensor) -> memoryview:
    import torch

    return memoryview(values.contiguous().view(-1).view(torch.uint8).numpy())
