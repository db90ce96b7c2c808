"""The verifiers' process: `python -P -m dapo_megatron.rewards.worker_process FD`, started by `workers.py`.

It loads the reward function once and from then on only forks: one scorer per request, so that another scorer costs milliseconds where
importing sympy costs seconds, and all share its memory. Protocol over the socket FD, pickled: the parent sends one WorkerSetup; the
process answers a RewardError and ends, or None once it can fork. Then the parent sends

* StartScorer: a scorer is forked; the answer is its process id, followed by the parent's end of a socket to it and by the memory of its
  `ProgressMark`;
* EndScorer: that scorer, and what it started, is killed and collected; the answer is its exit code.

Over its own socket a scorer takes ScoreRequests and sends the verdicts in their order, those of a twentieth of a second or of the whole
request in one ScorerReply; which response it is at stands in the mark. End of file ends scorer and process.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import resource
import signal
import sys
import threading
import time
import traceback
from multiprocessing import reduction
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import NoReturn

from dapo_megatron.rewards.messages import EndScorer, ScoreRequest, ScorerReply, StartScorer, WorkerSetup
from dapo_megatron.rewards.progress_mark import ProgressMark
from dapo_megatron.rewards.registry import Judge, load_reward_function
from dapo_megatron.rewards.stated_answer import stated_answer_rule
from dapo_megatron.types import RewardError, Score

_REPLY_SECONDS = 0.05
"""Verdicts wait no longer for others of their request: so much is done again when a scorer is killed."""
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def serve(control: Connection) -> None:
    """Load the reward function, then fork scorers until the parent closes its end."""
    setup: WorkerSetup = control.recv()
    try:
        judge = _load(setup)
    except RewardError as error:
        control.send(RewardError(str(error)))  # without its cause, which may not be picklable
        return
    gc.collect()
    gc.freeze()  # scorers share these pages as long as no collection writes to them
    control.send(None)
    scorers: set[int] = set()
    while True:
        try:
            request: StartScorer | EndScorer = control.recv()
        except EOFError:
            return
        if isinstance(request, StartScorer):
            scorers.add(_start(control, judge, setup.memory_limit_mib))
        elif request.pid in scorers:
            scorers.remove(request.pid)
            control.send(_end(request.pid))
        else:  # of a process before this one, with which it died
            control.send(-signal.SIGKILL)


def _load(setup: WorkerSetup) -> Judge:
    function = load_reward_function(setup.type, setup.function)
    if threading.active_count() > 1:
        names = ", ".join(thread.name for thread in threading.enumerate() if thread is not threading.main_thread())
        raise RewardError(
            f"reward.function ({setup.function}) starts threads when it is imported ({names}); scorers are forked after the import, "
            "start threads in the first call instead."
        )
    return Judge(function, setup.correct_reward, setup.wrong_reward, stated_answer_rule(setup.type))


def _start(control: Connection, judge: Judge, memory_limit_mib: int) -> int:
    parent_end, scorer_end = Pipe()
    mark_file = ProgressMark.new_file()
    with parent_end, scorer_end, os.fdopen(mark_file, "rb"):
        server_pid = os.getpid()
        pid = os.fork()
        if pid == 0:
            control.close()
            parent_end.close()
            _be_scorer(scorer_end, ProgressMark(mark_file), judge, memory_limit_mib, server_pid)
        control.send(pid)
        for handle in (parent_end.fileno(), mark_file):
            reduction.send_handle(control, handle, None)  # the destination is for Windows
    return pid


def _end(pid: int) -> int:
    """Nobody else collects a scorer, so the id is still its own."""
    with contextlib.suppress(ProcessLookupError):  # forked a moment ago and not yet leader of its group
        os.killpg(pid, signal.SIGKILL)
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _be_scorer(connection: Connection, mark: ProgressMark, judge: Judge, memory_limit_mib: int, server_pid: int) -> NoReturn:
    code = 1
    try:
        os.setsid()  # a kill of the group reaches what a user's function started
        _outlive_requests_to_stop()
        _die_with(server_pid)
        _limit_memory_growth(memory_limit_mib)
        _score(connection, mark, judge)
        code = 0
    except BaseException:  # noqa: BLE001 - a forked process must not run the code above the fork
        traceback.print_exc()
    finally:
        os._exit(code)


def _score(connection: Connection, mark: ProgressMark, judge: Judge) -> None:
    while True:
        try:
            request: ScoreRequest = connection.recv()
        except (EOFError, ConnectionResetError):
            return
        scores: list[Score] = []
        replied = time.monotonic()
        for place, response in enumerate(request.responses):
            mark.begin(place)
            scores.append(judge.score(response, request.answer))
            spent = (scores[-1].error or "").startswith(MemoryError.__name__)
            if spent or place + 1 == len(request.responses) or time.monotonic() > replied + _REPLY_SECONDS:
                connection.send(ScorerReply(tuple(scores), spent))
                scores.clear()
                replied = time.monotonic()


def _outlive_requests_to_stop() -> None:
    """A verdict ends with the controller's word alone; what a user's function starts hears the signals as usual."""
    stop = (signal.SIGTERM, signal.SIGUSR1)
    for number in stop:
        signal.signal(number, lambda number, frame: None)  # not SIG_IGN, which programs that are started would inherit
    signal.pthread_sigmask(signal.SIG_UNBLOCK, stop)


def _limit_memory_growth(limit_mib: int) -> None:
    """Allocations beyond the present address space plus `limit_mib` raise MemoryError in this process."""
    num_pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit_bytes = num_pages * resource.getpagesize() + limit_mib * 2**20
    _, hard_limit = resource.getrlimit(resource.RLIMIT_AS)
    if hard_limit != resource.RLIM_INFINITY:
        limit_bytes = min(limit_bytes, hard_limit)
    resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))


def _die_with(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent is gone, even in the middle of an endless computation."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # gone before the call
        os._exit(1)


def main() -> None:
    """Entry of the process; the only argument is the number of the inherited socket."""
    sys.path.append(os.getcwd())  # where a user's `reward.function` may lie
    with Connection(int(sys.argv[1])) as control:
        serve(control)


if __name__ == "__main__":
    main()
