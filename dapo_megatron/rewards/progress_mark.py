"""Which response of a request a scorer is at, and since when: 16 bytes of memory that scorer and parent share.

The parent looks at them only when a deadline passes or a scorer dies, so verdicts can travel many at a time.
"""

from __future__ import annotations

import mmap
import os
import time

_SIZE = 16


class ProgressMark:
    """Written by one process at a time: the parent before it sends a request, the scorer from then on.

    Each number is one store and one load of 8 bytes, so none is seen half written: such a time would be long past, and its scorer killed.
    """

    def __init__(self, fd: int):
        """`fd` is that of `new_file`, in any process; it may be closed afterwards."""
        self._memory = mmap.mmap(fd, _SIZE)
        self._places, self._times = memoryview(self._memory).cast("q"), memoryview(self._memory).cast("d")

    @staticmethod
    def new_file() -> int:
        """A file descriptor of memory for one mark."""
        fd = os.memfd_create("progress-mark")
        os.truncate(fd, _SIZE)
        return fd

    def begin(self, place: int) -> None:
        """The response at `place` of the request is being scored from now on."""
        self._times[1] = time.monotonic()  # first: a new place never has the time of the one before
        self._places[0] = place

    @property
    def place(self) -> int:
        """Index of the response in its request."""
        return self._places[0]

    @property
    def started(self) -> float:
        """`time.monotonic()` of its beginning, a clock that all processes of a machine share."""
        return self._times[1]

    def close(self) -> None:
        """Let go of the memory."""
        self._places.release()
        self._times.release()
        self._memory.close()
