"""Size and hash of a file: what a checkpoint's marker lists and what loading compares."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import xxhash

_CHUNK_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True)
class FileDigest:
    """Of one file; `xxh3` is xxh3_128 of its bytes in hex."""

    num_bytes: int
    xxh3: str


def digest_file(path: Path) -> FileDigest:
    """Reads the whole file."""
    running, size = xxhash.xxh3_128(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            running.update(chunk)
            size += len(chunk)
    return FileDigest(size, running.hexdigest())
