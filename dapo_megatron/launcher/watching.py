"""A thread that looks after something while other work is done."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def watching(name: str, watch: Callable[[threading.Event], None]) -> Iterator[None]:
    """Meanwhile `watch` runs in a thread of that name; it must return soon after the event it gets is set."""
    ended = threading.Event()
    thread = threading.Thread(target=watch, args=(ended,), name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
