"""Which response of a request a scorer is at, and since when: 16 bytes of memory that scorer and parent share.

The parent looks at them only when a deadline passes or a scorer dies, so verdicts can travel many at a time.
"""

from __future__ import annotations

import mmap
import os
import struct
import time

_PLACE, _STARTED = struct.Struct("<q"), struct.Struct("<d")
_SIZE = _PLACE.size + _STARTED.size


class ProgressMark:
    """Written by one process at a time: the parent before it sends a request, the scorer from then on."""

    def __init__(self, fd: int):
        """`fd` is that of `new_file`, in any process; it may be closed afterwards."""
        self._memory = mmap.mmap(fd, _SIZE)

    @staticmethod
    def new_file() -> int:
        """A file descriptor of memory for one mark."""
        fd = os.memfd_create("progress-mark")
        os.truncate(fd, _SIZE)
        return fd

    def begin(self, place: int) -> None:
        """The response at `place` of the request is being scored from now on."""
        _STARTED.pack_into(self._memory, _PLACE.size, time.monotonic())  # first: a new place never has the time of the one before
        _PLACE.pack_into(self._memory, 0, place)

    @property
    def place(self) -> int:
        """Index of the response in its request."""
        return _PLACE.unpack_from(self._memory, 0)[0]

    @property
    def started(self) -> float:
        """`time.monotonic()` of its beginning, a clock that all processes of a machine share."""
        return _STARTED.unpack_from(self._memory, _PLACE.size)[0]

    def close(self) -> None:
        """Let go of the memory."""
        self._memory.close()
