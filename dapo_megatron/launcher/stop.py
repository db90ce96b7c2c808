"""SIGUSR1 and SIGTERM tell a run to stop: it saves and ends with exit code 85.

Both signals are blocked in the main thread and all that it starts, processes included; one thread of this process hears them. A scheduler
that signals all processes of a job therefore reaches the controller alone: ranks, engines and reward workers live on until the
checkpoint is complete. SIGINT (Ctrl-C) is untouched: it ends the run at once.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = frozenset({signal.SIGUSR1, signal.SIGTERM})


class StopRequest:
    """Whether the run has been told to stop, and by what."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reason: str | None = None
        self._heard_by: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None
        self._wakeup: socket.socket | None = None

    @property
    def reason(self) -> str | None:
        """The name of the first signal; None while the run may go on."""
        return self._reason

    def request(self, reason: str) -> None:
        """Tell it, from any thread. What nobody listens for (`listening`) interrupts the main thread as Ctrl-C does."""
        with self._lock:
            if self._reason is not None:
                return
            self._reason = reason
            if self._heard_by is not None:
                loop, event = self._heard_by
                loop.call_soon_threadsafe(event.set)
                return
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    def arm(self) -> None:
        """Take the signals (again): Ray takes SIGTERM for itself when it starts. In the main thread, within `stop_on_signals`."""
        if self._wakeup is not None:
            for number in SIGNALS:
                signal.signal(number, lambda number, frame: None)
            signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)

    @contextmanager
    def listening(self) -> Iterator[asyncio.Event]:
        """Within an event loop: the event is set by the request, and nothing is interrupted. One listener at a time."""
        event = asyncio.Event()
        with self._lock:
            self._heard_by = (asyncio.get_running_loop(), event)
            if self._reason is not None:
                event.set()
        try:
            yield event
        finally:
            with self._lock:
                self._heard_by = None


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn the signals into a StopRequest. To be entered by the main thread before it starts threads and processes of its own."""
    request = StopRequest()
    heard, wakeup = socket.socketpair()
    wakeup.setblocking(False)

    def wait() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        while number := heard.recv(1):
            if number[0] in SIGNALS:
                request.request(signal.Signals(number[0]).name)

    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    fd_before = signal.set_wakeup_fd(-1)
    request._wakeup = wakeup
    request.arm()  # a handler, because a library's thread may exist already and hear the signal: whichever does writes the byte
    mask_before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    thread = threading.Thread(target=wait, name="stop-signals", daemon=True)
    thread.start()
    try:
        yield request
    finally:
        signal.set_wakeup_fd(fd_before)
        request._wakeup = None
        wakeup.close()
        thread.join()
        heard.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask_before)
