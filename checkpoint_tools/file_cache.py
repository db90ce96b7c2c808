"""Descriptors kept open for reading and writing at places of many files."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path

_MAX_OPEN = 64


class FileCache:
    """At most 64 files open at a time, the one that was not used for longest is closed first."""

    def __init__(self) -> None:
        self._open: OrderedDict[tuple[Path, int], int] = OrderedDict()

    def open(self, path: Path, flags: int) -> int:
        """The descriptor of `path`, opened with `flags` of the os module. OSError as os.open."""
        key = (path, flags)
        if key not in self._open:
            if len(self._open) >= _MAX_OPEN:
                os.close(self._open.popitem(last=False)[1])
            self._open[key] = os.open(path, flags)
        self._open.move_to_end(key)
        return self._open[key]

    def __del__(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)


def write_all(file: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of it at `offset`. OSError as os.pwrite."""
    view = memoryview(data)
    while view:
        count = os.pwrite(file, view, offset)
        view, offset = view[count:], offset + count
