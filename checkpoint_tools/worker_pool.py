"""N processes that take disjoint tasks, under one bound of memory.

A worker process is a fresh interpreter that imports what its tasks need and no more: torch alone would cost half a gigabyte in
each. One worker works in this process. A worker dies with its parent.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import math
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

from checkpoint_tools.byte_sizes import format_bytes
from checkpoint_tools.errors import WriteError
from dapo_megatron.types import ConfigError, DapoMegatronError

MIN_MEMORY_BYTES = 4 * 2**20
"""Of one worker."""
_BYTES_WORTH_A_PROCESS = 256 * 2**20
_MAX_DEFAULT_WORKERS = 8
_QUEUED_TASKS = 2
"""Sent to a worker at a time, so that it need not wait for the next."""
_PR_SET_PDEATHSIG = 1


class Task(Protocol):
    """What a worker does at once: a frozen dataclass that can be pickled."""

    @property
    def name(self) -> str:
        """Unique; the journal's key."""
        ...

    @property
    def num_bytes(self) -> int:
        """What it reports in all through `Report`."""
        ...


Report = Callable[[int], None]
"""Called by a task with the bytes done since the last call."""


class Worker(Protocol):
    """Does tasks of one kind. A record is JSON."""

    def work(self, task: Any, report: Report) -> Any:
        """Do it; its record."""
        ...

    def check(self, task: Any, record: Any, report: Report) -> bool:
        """Whether the output holds what the record of an earlier run says, by reading it."""
        ...


MakeWorker = Callable[[int], Worker]
"""(bytes of memory that buffers may take) -> a worker; called once in each process, so it must be picklable."""


@dataclass(frozen=True, slots=True)
class Done:
    """A task that is done; `was_kept`: by an earlier run, and found in order."""

    name: str
    record: Any
    was_kept: bool
    process: int
    peak_memory_bytes: int
    """Largest resident set of that process so far."""


@dataclass(frozen=True, slots=True)
class Pool:
    """How many workers, and the memory of each. ConfigError when the bound is too tight."""

    num_workers: int
    max_memory: int
    """Bytes of all buffers together; interpreters come on top."""

    def __post_init__(self) -> None:
        if self.num_workers < 1:
            raise ConfigError([f"--workers ({self.num_workers}) must be at least 1"])
        if self.memory_per_worker < MIN_MEMORY_BYTES:
            needed = format_bytes(self.num_workers * MIN_MEMORY_BYTES)
            raise ConfigError(
                [f"--max-memory ({format_bytes(self.max_memory)}) must be at least {needed} for --workers {self.num_workers}"]
            )

    @classmethod
    def choose(cls, num_workers: int | None, max_memory: int, num_bytes: int) -> Pool:
        """As asked for; without `num_workers`, one a processor, as far as the work is worth a process."""
        worth = math.ceil(num_bytes / _BYTES_WORTH_A_PROCESS)
        default = max(1, min(len(os.sched_getaffinity(0)), worth, _MAX_DEFAULT_WORKERS))
        return cls(default if num_workers is None else num_workers, max_memory)

    @property
    def memory_per_worker(self) -> int:
        return self.max_memory // self.num_workers


def run_tasks(
    pool: Pool, make_worker: MakeWorker, tasks: Sequence[Task], claims: Mapping[str, Any], report: Report
) -> Iterator[Done]:
    """Do the tasks, in any order; those that have a record in `claims` only if it does not hold.

    An error of the user's making is raised here as it was raised in the worker; WriteError when a worker dies.
    """
    if pool.num_workers == 1 or len(tasks) <= 1:
        worker = make_worker(pool.max_memory)
        for task in tasks:
            yield _do(worker, task, claims.get(task.name), report)
        return
    waiting = iter([(task, claims.get(task.name)) for task in tasks])
    workers = [_Process(make_worker, pool.memory_per_worker) for _ in range(min(pool.num_workers, len(tasks)))]
    try:
        for process in workers:
            process.take(waiting, _QUEUED_TASKS)
        while busy := [process for process in workers if process.names]:
            ready = wait([process.pipe for process in busy])
            for process in (process for process in busy if process.pipe in ready):
                message = process.receive()
                if isinstance(message, int):
                    report(message)
                elif isinstance(message, DapoMegatronError):
                    raise message
                else:
                    yield message
                    process.names.pop(0)
                    process.take(waiting, 1)
    finally:
        for process in workers:
            process.stop()


def _do(worker: Worker, task: Task, claim: Any, report: Report) -> Done:
    keep = claim is not None and worker.check(task, claim, report)
    record = claim if keep else worker.work(task, report)
    return Done(task.name, record, keep, os.getpid(), peak_memory_bytes())


def peak_memory_bytes() -> int:
    """The largest resident set that this process has had. (`ru_maxrss` would count its parent's from before exec.)"""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


class _Process:
    """The parent's side of a worker process."""

    def __init__(self, make_worker: MakeWorker, memory_bytes: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.names: list[str] = []
        self._process: BaseProcess = context.Process(
            target=_main, args=(theirs, make_worker, memory_bytes, os.getpid()), daemon=True
        )
        self._process.start()
        theirs.close()

    def take(self, waiting: Iterator[tuple[Task, Any]], count: int) -> None:
        for task, claim in itertools.islice(waiting, count):
            self.names.append(task.name)
            with contextlib.suppress(BrokenPipeError):  # it died; `receive` will say so
                self.pipe.send((task, claim))

    def receive(self) -> int | Done | DapoMegatronError:
        try:
            message: int | Done | DapoMegatronError = self.pipe.recv()
            return message
        except (EOFError, ConnectionResetError):
            self._process.join()
            code = self._process.exitcode or 0
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            raise WriteError(
                f"the worker that had {self.names[0]} died ({how}); if memory ran out, lower --workers or --max-memory; "
                "then run the same command again: finished tensors are kept"
            ) from None

    def stop(self) -> None:
        self._process.kill()
        self._process.join()
        self.pipe.close()


def _main(pipe: Connection, make_worker: MakeWorker, memory_bytes: int, parent: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-c is the parent's to handle
    if os.getppid() != parent:
        return
    try:
        worker = make_worker(memory_bytes)
        while True:
            task, claim = pipe.recv()
            pipe.send(_do(worker, task, claim, pipe.send))
    except DapoMegatronError as error:
        pipe.send(error)
    except EOFError:
        pass
