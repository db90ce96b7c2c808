"""The phases of a step: how long they took, and when one of them makes no progress any more."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field

from dapo_megatron.config.schema import ClusterConfig
from dapo_megatron.exit_codes import ExitCode
from dapo_megatron.launcher.phase_history import PhaseHistory
from dapo_megatron.launcher.watching import watching
from dapo_megatron.types import StalledError

FLOOR_SECONDS = 600.0
"""No learnt deadline is shorter."""
FACTOR = 10.0
"""A learnt deadline is so many times the longest the phase has taken so far."""
_CLEANUP_SECONDS = 5.0
_LAST_RESORT_SECONDS = 120.0
"""After a deadline: how long an event loop that does not act on it keeps the process alive."""


@dataclass(frozen=True, slots=True)
class Deadlines:
    """How long each phase may take: as configured or else learnt from how long it took before."""

    config: ClusterConfig
    history: PhaseHistory = field(default_factory=PhaseHistory)

    def of(self, phase: str) -> float:
        """In seconds."""
        times = self.history.of(phase)
        if self.config.phase_deadline_seconds is not None or times is None:
            return self.config.unlearnt_deadline_seconds
        return max(FLOOR_SECONDS, FACTOR * times.longest_seconds)

    def in_words(self, phase: str) -> str:
        """Where the deadline of a phase comes from."""
        if self.config.phase_deadline_seconds is not None:
            return "cluster.phase_deadline_seconds"
        times = self.history.of(phase)
        if times is None:
            return "the deadline without a history; cluster.phase_deadline_seconds sets one"
        return f"learnt: {FACTOR:g} times the longest so far, {times.longest_seconds:.1f} s; cluster.phase_deadline_seconds sets another"


Diagnose = Callable[[str], str]
"""Takes the words for what stalled, gathers evidence (seconds, blocking), returns a summary."""


class PhaseClock:
    """Runs the phases of a step under their deadlines and keeps their wall-clock seconds."""

    def __init__(
        self,
        deadlines: Deadlines,
        on_phase: Callable[[str], None] = lambda phase: None,
        diagnose: Diagnose = lambda words: "",
    ):
        """`on_phase` hears of each phase as it begins."""
        self._deadlines, self._on_phase, self._diagnose = deadlines, on_phase, diagnose
        self._running: tuple[str, float] | None = None
        self.start_step()

    def start_step(self) -> None:
        """Begin to count anew."""
        self._seconds: dict[str, float] = {}
        self._step_start = time.perf_counter()

    async def run[T](self, phase: str, work: Awaitable[T], *, learns: bool = True) -> T:
        """Await one phase. StalledError, with the diagnosis, when it is not over at its deadline.

        `learns` False: its time says nothing about the next one's.
        """
        start, deadline = time.perf_counter(), self._deadlines.of(phase)
        self._on_phase(phase)
        self._running = (phase, time.monotonic() + deadline)
        task = asyncio.ensure_future(work)
        try:
            done, _ = await asyncio.wait({task}, timeout=deadline)
            if not done:
                summary = await asyncio.to_thread(self._diagnose, self._words(phase))
                raise StalledError(f"{self._words(phase)}. {summary}".rstrip())
            result = task.result()
            if learns:
                self.learn(phase, time.perf_counter() - start)
            return result
        finally:
            self._running = None
            self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - start
            if not task.done():
                task.cancel()
                await asyncio.wait({task}, timeout=_CLEANUP_SECONDS)

    def deadline(self, phase: str) -> float:
        """Of the next phase of that name, in seconds."""
        return self._deadlines.of(phase)

    def learn(self, phase: str, seconds: float) -> None:
        """So long a phase has taken."""
        self._deadlines.history.add(phase, seconds)

    def seconds(self) -> dict[str, float]:
        """Phase -> seconds of this step, and `step` for all of it."""
        return {**self._seconds, "step": time.perf_counter() - self._step_start}

    def last_resort(
        self, *, poll_seconds: float = 5.0, wait_seconds: float = _LAST_RESORT_SECONDS
    ) -> AbstractContextManager[None]:
        """End this process, diagnosed, when a phase is over its deadline and the event loop itself stands still."""

        def watch(ended: threading.Event) -> None:
            while not ended.wait(poll_seconds):
                running = self._running
                if running is None or time.monotonic() < running[1] + wait_seconds:
                    continue
                words = f"{self._words(running[0])}, and the controller itself stands still"
                with suppress(Exception):
                    print(f"error: {words}. {self._diagnose(words)}", flush=True)
                os._exit(ExitCode.STALLED)

        return watching("last-resort", watch)

    def _words(self, phase: str) -> str:
        return f"phase {phase} did not end within {self._deadlines.of(phase):g} s ({self._deadlines.in_words(phase)})"
