"""Files that are either whole or not there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def whole_file(path: Path, *, durable: bool = False) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of `path` when the block ends, and is gone when it raises. One writer at a time.

    `durable`: on disk by then, at the price of a wait. Raises OSError.
    """
    unfinished = path.with_name(f".{path.name}.new")
    try:
        with unfinished.open("wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def write_whole(path: Path, content: str | bytes, *, durable: bool = False) -> None:
    """Write a file, or leave what was there; see `whole_file`. Text is UTF-8."""
    with whole_file(path, durable=durable) as file:
        file.write(content.encode() if isinstance(content, str) else content)
