"""Calls to processes of the run.

A call to several fails with the process that died first (the others then report broken connections), its name and its last log lines.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError, RayTaskError

from dapo_megatron.types import DapoMegatronError, WorkerDiedError

NUM_LOG_LINES = 15
"""Log lines quoted when a process dies."""
GRACE_SECONDS = 5.0
"""After the first failure: how long to wait for the process that caused it to be reported."""


@dataclass(frozen=True, slots=True)
class Process:
    """A Ray actor with the name users know it by."""

    name: str
    handle: Any
    log_file: Path

    def died(self, reason: object) -> WorkerDiedError:
        """Says so, with the end of its log."""
        lines = self.log_file.read_text(errors="replace").splitlines() if self.log_file.is_file() else []
        tail = "\n".join(f"    {line}" for line in lines[-NUM_LOG_LINES:])
        return WorkerDiedError(f"{self.name} died ({reason}). Last lines of {self.log_file}:\n{tail or '    (empty)'}")


async def call_all(processes: Sequence[Process], method: str, *args: Any) -> list[Any]:
    """Call a method on all processes at once; results in their order. Fails with the process that died, else the first error."""
    return await call_each(processes, method, [args] * len(processes))


async def call_each(processes: Sequence[Process], method: str, args_of_each: Sequence[tuple[Any, ...]]) -> list[Any]:
    """`call_all` with arguments of its own for each process."""
    tasks = [
        asyncio.ensure_future(call(process, getattr(process.handle, method).remote(*args)))
        for process, args in zip(processes, args_of_each, strict=True)
    ]
    return await first_failure(tasks)


async def call(process: Process, reference: Any) -> Any:
    """The result of a call of this process's."""
    try:
        return await reference
    except RayError as error:
        raise in_words(process, error) from error


async def exhaust(process: Process, stream: Any) -> None:
    """Wait for the end of a streaming call of this process's, whose results nobody wants."""
    try:
        async for reference in stream:
            await reference
    except RayError as error:
        raise in_words(process, error) from error


async def first_failure(tasks: Sequence[asyncio.Future]) -> list[Any]:
    """Results of all calls, in their order. At the first error the others are given up, after a wait for a death that explains it."""
    if not tasks:
        return []
    try:
        done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        if any(task.exception() for task in done):
            late, _ = await asyncio.wait(pending, timeout=GRACE_SECONDS) if pending else (set(), set())
            errors = [error for task in (*done, *late) if (error := task.exception())]
            raise next((error for error in errors if isinstance(error, WorkerDiedError)), errors[0])
        return [task.result() for task in tasks]
    finally:
        for task in tasks:
            task.cancel()


def in_words(process: Process, error: RayError) -> Exception:
    """Our own errors as they were raised; a death by name; anything else with the process it came from."""
    if isinstance(error, RayTaskError):
        cause = error.cause
        if isinstance(cause, DapoMegatronError):
            return cause
        if isinstance(cause, AssertionError):  # not a death: it would come again
            return AssertionError(str(process.died(f"{type(cause).__name__}: {cause}")))
        return process.died(f"{type(cause).__name__}: {cause}")
    if isinstance(error, ActorDiedError | ActorUnavailableError):
        return process.died("its process ended")
    return process.died(error)
