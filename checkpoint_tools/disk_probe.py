"""How fast a disk reads and writes, from a second of trying."""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from checkpoint_tools.errors import reading, writing
from checkpoint_tools.output_folder import existing_parent

_PROBE_BYTES = 64 * 2**20
_BLOCK_BYTES = 8 * 2**20


@dataclass(frozen=True, slots=True)
class DiskRates:
    """Bytes per second; `same_disk`: reading and writing share it."""

    read: float
    write: float
    same_disk: bool

    def predicted_seconds(self, read_bytes: int, written_bytes: int) -> float:
        """One after the other on one disk, side by side on two."""
        parts = (read_bytes / self.read, written_bytes / self.write)
        return sum(parts) if self.same_disk else max(parts)


def probe_disks(source: Path, target: Path) -> DiskRates:
    """Read the start of the file `source`, not from memory where the system allows it, and write a scratch file where `target` will be."""
    folder = existing_parent(target)
    with reading(source), source.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, _PROBE_BYTES, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        num_read = sum(len(block) for block in iter(lambda: file.read(_BLOCK_BYTES) if file.tell() < _PROBE_BYTES else b"", b""))
        read_seconds = time.perf_counter() - start
    with writing(folder), tempfile.TemporaryFile(dir=folder, buffering=0) as scratch:
        block = os.urandom(_BLOCK_BYTES)
        start = time.perf_counter()
        for _ in range(_PROBE_BYTES // _BLOCK_BYTES):
            scratch.write(block)
        os.fsync(scratch.fileno())
        write_seconds = time.perf_counter() - start
    same_disk = source.stat().st_dev == folder.stat().st_dev
    return DiskRates(max(num_read, 1) / read_seconds, _PROBE_BYTES / write_seconds, same_disk)
