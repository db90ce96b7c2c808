"""Killable verifier processes: the parent's side.

One thread per process. The thread starts its process, takes jobs (a few responses to one problem) from a queue that all threads
share, and waits for one Score at a time, with a deadline for each. A process that is over the deadline is killed, one that died
is noticed by end of file; either way the response it was scoring gets a wrong verdict, the rest of the job goes back to the
queue, and the thread starts another process. Threads rather than asyncio keep this independent of the caller's event loop.

The processes are started with subprocess rather than multiprocessing, whose spawn method imports the parent's main
module again in each child: that would bring ray and torch into the verifiers.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import queue
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from multiprocessing.connection import Pipe
from types import TracebackType
from typing import Any, Self

from dapo_megatron.config.schema import RewardConfig
from dapo_megatron.rewards import worker_process
from dapo_megatron.rewards.worker_process import ScoreRequest, WorkerSetup
from dapo_megatron.types import RewardError, Score

_RESPONSES_PER_JOB = 8
_START_DEADLINE_SECONDS = 120.0


class RewardWorkers:
    """A pool of verifier processes, shared by any number of concurrent `score` calls.

    The processes start with the constructor and in parallel; `wait_ready` waits for them. Once one of them cannot be
    started, or after `close`, every call raises RewardError.
    """

    def __init__(self, config: RewardConfig):
        self._config = config
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._processes: set[_VerifierProcess] = set()
        self._stopped_by: Exception | None = None
        self._ready = [Future[None]() for _ in range(config.num_workers)]
        self._threads = [
            threading.Thread(target=self._run, args=(ready,), name=f"reward-worker-{number}", daemon=True)
            for number, ready in enumerate(self._ready)
        ]
        for thread in self._threads:
            thread.start()

    async def wait_ready(self) -> None:
        """Return when every process can score. Raises RewardError when one cannot, such as for a wrong reward.function."""
        await asyncio.gather(*map(asyncio.wrap_future, self._ready))

    async def score(self, responses: Sequence[str], answer: str) -> tuple[Score, ...]:
        """Verdicts on responses to one problem, in the order of the responses.

        Only the last `reward.max_response_chars` characters of each are looked at. A verdict that takes longer than
        `reward.timeout_seconds`, or that ends its process, is wrong with `error` set. Raises RewardError when the
        workers cannot be started or are closed.
        """
        tails = [response[-self._config.max_response_chars :] for response in responses]
        jobs = [_Job(batch, answer) for batch in itertools.batched(tails, _RESPONSES_PER_JOB)]
        for job in jobs:
            self._submit(job)
        batches = await asyncio.gather(*(asyncio.wrap_future(job.future) for job in jobs))
        return tuple(itertools.chain.from_iterable(batches))

    def close(self) -> None:
        """Kill the processes and end the threads; pending `score` calls raise RewardError. Closing twice is harmless."""
        self._stop(RewardError("The reward workers are closed; make new RewardWorkers to score on."))
        for thread in self._threads:
            thread.join()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _submit(self, job: _Job) -> None:
        with self._lock:
            if self._stopped_by is None:
                self._jobs.put(job)
                return
        job.fail(self._stopped_by)

    def _stop(self, reason: Exception) -> None:
        """Fail what waits and wake every thread; the first reason stays."""
        with self._lock:
            if self._stopped_by is not None:
                return
            self._stopped_by = reason
            for process in self._processes:
                process.signal_kill()
            waiting = self._empty_queue()
            for _ in self._threads:
                self._jobs.put(None)
        for job in waiting:
            job.fail(reason)
        for ready in self._ready:
            _fail(ready, reason)

    def _empty_queue(self) -> list[_Job]:
        jobs: list[_Job] = []
        with contextlib.suppress(queue.Empty):
            while (job := self._jobs.get_nowait()) is not None:
                jobs.append(job)
        return jobs

    def _run(self, ready: Future[None]) -> None:
        """Body of a thread: one process at a time, fed from the queue."""
        job = None
        try:
            process = self._start_process()
            _resolve(ready, None)
            while (job := self._jobs.get()) is not None:
                if not self._score(process, job):
                    self._retire(process)
                    process = self._start_process()
            self._retire(process)
        except Exception as error:  # noqa: BLE001 - whatever ends a thread must reach those who wait, else they wait for ever
            self._stop(error)
            if job is not None:
                job.fail(error)

    def _score(self, process: _VerifierProcess, job: _Job) -> bool:
        """Score what is left of a job; False when that took the process, in which case the rest is back in the queue."""
        if job.future.cancelled():
            return True
        try:
            process.send(ScoreRequest(job.remaining, job.answer))
            while job.remaining:
                job.scores.append(process.receive(self._config.timeout_seconds))
        except _VerdictMissing as missing:
            job.scores.append(Score(self._config.wrong_reward, correct=False, error=str(missing)))
            if self._stopped_by is not None:
                job.fail(self._stopped_by)
            elif job.remaining:
                self._submit(job)
            else:
                job.finish()
            return False
        job.finish()
        return True

    def _start_process(self) -> _VerifierProcess:
        process = _VerifierProcess()
        with self._lock:
            self._processes.add(process)
            stopped_by = self._stopped_by
        try:
            if stopped_by is not None:
                raise stopped_by
            process.set_up(self._config)
        except Exception:
            self._retire(process)
            raise
        return process

    def _retire(self, process: _VerifierProcess) -> None:
        with self._lock:
            self._processes.discard(process)
        process.kill()


class _VerdictMissing(Exception):
    """The process is over the deadline or gone."""


@dataclass(slots=True, eq=False)
class _Job:
    """Some responses to one problem; `scores` grows in their order."""

    responses: tuple[str, ...]
    answer: str
    scores: list[Score] = field(default_factory=list)
    future: Future[list[Score]] = field(default_factory=Future)

    @property
    def remaining(self) -> tuple[str, ...]:
        return self.responses[len(self.scores) :]

    def finish(self) -> None:
        _resolve(self.future, self.scores)

    def fail(self, error: Exception) -> None:
        _fail(self.future, error)


def _resolve[T](future: Future[T], result: T) -> None:
    with contextlib.suppress(InvalidStateError):  # the waiting task was cancelled
        future.set_result(result)


def _fail[T](future: Future[T], error: Exception) -> None:
    with contextlib.suppress(InvalidStateError):  # done already, or the waiting task was cancelled
        future.set_exception(error)


class _VerifierProcess:
    """One process in a group of its own, and the parent's end of its socket."""

    def __init__(self) -> None:
        self._connection, child_end = Pipe()
        self._poller = select.poll()  # Connection.poll would build one per call
        self._poller.register(self._connection, select.POLLIN)
        with child_end:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", worker_process.__name__, str(child_end.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[child_end.fileno()],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
                start_new_session=True,  # Ctrl-C is for the parent alone; a kill reaches what a user's function started
            )

    def set_up(self, config: RewardConfig) -> None:
        """Wait until the process can score. Raises RewardError."""
        setup = WorkerSetup(config.type, config.function, config.correct_reward, config.wrong_reward, config.memory_limit_mib)
        try:
            self.send(setup)
            failure = self.receive(_START_DEADLINE_SECONDS)
        except _VerdictMissing as missing:
            raise RewardError(
                f"A verifier process could not start for reward.type {config.type} (reward.function: {config.function}): "
                f"{missing}; see its messages on standard error."
            ) from missing
        if failure is not None:
            raise failure

    def send(self, message: WorkerSetup | ScoreRequest) -> None:
        # a process that is gone shows by end of file in `receive`
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._connection.send(message)

    def receive(self, timeout_seconds: float) -> Any:
        """The next message. Raises _VerdictMissing."""
        try:
            if self._poller.poll(timeout_seconds * 1000):
                return self._connection.recv()
        except (EOFError, ConnectionResetError):
            self.kill()
            raise _VerdictMissing(f"the verifier process ended with code {self._process.returncode}") from None
        raise _VerdictMissing(f"no answer within {timeout_seconds:g} s; the verifier process was killed")

    def signal_kill(self) -> None:
        """Send SIGKILL to the process and to what it started, without waiting."""
        if self._process.returncode is None:  # later the process id may belong to somebody else
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def kill(self) -> None:
        """End the process, collect it and close the socket."""
        self.signal_kill()
        self._process.wait()
        self._connection.close()
