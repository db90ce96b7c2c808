"""The parent's end of the verifiers' process: start it, have scorers forked and ended, talk to one scorer.

The process is started with subprocess rather than multiprocessing, whose spawn method imports the parent's main module again in the
child: that would bring ray and torch into the verifiers. Its protocol is in `worker_process.py`.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import reduction
from multiprocessing.connection import Connection, Pipe
from typing import Any

from dapo_megatron.config.schema import RewardConfig
from dapo_megatron.rewards import worker_process
from dapo_megatron.rewards.messages import EndScorer, ScoreRequest, ScorerReply, StartScorer, WorkerSetup
from dapo_megatron.rewards.progress_mark import ProgressMark
from dapo_megatron.types import RewardError

_START_DEADLINE_SECONDS = 120.0
_GONE = (EOFError, BrokenPipeError, ConnectionResetError)


class VerdictMissing(Exception):
    """The scorer is over the deadline (`late`) or gone."""

    def __init__(self, message: str, *, late: bool):
        super().__init__(message)
        self.late = late


class Scorer:
    """One forked process and the parent's end of the socket to it. Used by one thread, except for `kill`."""

    def __init__(self, pid: int, connection: Connection, mark: ProgressMark):
        self.pid, self._connection, self._mark = pid, connection, mark
        self._poller = select.poll()  # Connection.poll would build one per call
        self._poller.register(connection, select.POLLIN)

    def send(self, request: ScoreRequest) -> None:
        """Give it responses to score; a process that is gone shows in `receive`."""
        self._mark.begin(0)
        with contextlib.suppress(*_GONE):
            self._connection.send(request)

    def receive(self, timeout_seconds: float) -> ScorerReply:
        """The next verdicts. Raises VerdictMissing, then `place` is the response without one; others before it may lack theirs too."""
        deadline = None
        try:
            while deadline != (deadline := self._mark.started + timeout_seconds):  # until it is at the same response as before
                if self._poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
                    return self._connection.recv()
        except _GONE:
            raise VerdictMissing("the verifier process ended", late=False) from None
        raise VerdictMissing(f"no answer within {timeout_seconds:g} s; the verifier process was killed", late=True)

    @property
    def place(self) -> int:
        """Which response of the request it is at."""
        return self._mark.place

    def kill(self) -> None:
        """SIGKILL to it and to what it started. For a scorer that the server has not been asked to end: the id is still its own."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def close(self) -> None:
        """Close the socket and let go of the mark."""
        self._connection.close()
        self._mark.close()


class VerifierServer:
    """The process that loads the reward function and forks scorers; started with the constructor and again when it dies."""

    def __init__(self, config: RewardConfig):
        self._config = config
        self._lock = threading.Lock()
        self._killed = False
        self._launch()

    def start_scorer(self) -> Scorer:
        """Fork a scorer, after waiting for the reward function to be loaded. Raises RewardError when it cannot be."""
        with self._lock:
            self._wait_until_loaded()
            with contextlib.suppress(*_GONE):
                return self._fork()
            if self._killed:
                raise RewardError("The reward workers are closed.")
            self._collect()  # it ended since the last call, from outside
            self._launch()
            self._wait_until_loaded()
            try:
                return self._fork()
            except _GONE as error:
                raise RewardError(
                    f"The verifier process ended twice while it forked a scorer, with code {self._process.wait()}; see its messages on "
                    "standard error, and the limits on processes and memory of this machine."
                ) from error

    def end_scorer(self, scorer: Scorer) -> int:
        """Kill a scorer and what it started; its exit code."""
        scorer.close()
        with self._lock, contextlib.suppress(*_GONE):
            self._control.send(EndScorer(scorer.pid))
            return self._control.recv()
        return -signal.SIGKILL  # scorers die with their server

    def kill(self) -> None:
        """End the process and its scorers, without waiting for a start that is under way."""
        self._killed = True
        self._process.kill()

    def close(self) -> None:
        """`kill`, and collect the process."""
        self.kill()
        with self._lock:
            self._collect()

    def _launch(self) -> None:
        self._control, child_end = Pipe()
        with child_end:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", worker_process.__name__, str(child_end.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[child_end.fileno()],
                # one thread for numerical libraries in every scorer, unless told otherwise
                env={"OMP_NUM_THREADS": "1"} | os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
                start_new_session=True,  # Ctrl-C is for the parent alone
            )
        if self._killed:  # meanwhile, from another thread
            self._process.kill()
        self._loaded = False
        config = self._config
        setup = WorkerSetup(config.type, config.function, config.correct_reward, config.wrong_reward, config.memory_limit_mib)
        with contextlib.suppress(*_GONE):  # shows in the first answer
            self._control.send(setup)

    def _wait_until_loaded(self) -> None:
        if self._loaded:
            return
        reason = f"no answer within {_START_DEADLINE_SECONDS:g} s"
        try:
            if self._control.poll(_START_DEADLINE_SECONDS):
                failure: RewardError | None = self._control.recv()
                if failure is not None:
                    raise failure
                self._loaded = True
                return
        except _GONE:
            reason = f"it ended with code {self._process.wait()}"
        config = self._config
        raise RewardError(
            f"The verifier process could not start for reward.type {config.type} (reward.function: {config.function}): "
            f"{reason}; see its messages on standard error."
        )

    def _fork(self) -> Scorer:
        self._control.send(StartScorer())
        pid: int = self._control.recv()
        connection: Any = Connection(reduction.recv_handle(self._control))
        try:
            with os.fdopen(reduction.recv_handle(self._control), "rb") as mark_file:
                return Scorer(pid, connection, ProgressMark(mark_file.fileno()))
        except _GONE:
            connection.close()
            raise

    def _collect(self) -> None:
        self._process.kill()
        self._process.wait()
        self._control.close()
