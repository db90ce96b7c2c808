"""The verifier process: `python -P -m dapo_megatron.rewards.worker_process FD`, started by `workers.py`.

Protocol over the socket FD, pickled: the parent sends one WorkerSetup; the process answers a RewardError and ends, or None once
it can score. From then on the parent sends a ScoreRequest and the process sends one Score per response, in order and each
as soon as it is known, so that the parent sees which response is being scored. End of file ends the process.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from dapo_megatron.rewards.registry import Judge, load_reward_function
from dapo_megatron.rewards.stated_answer import stated_answer_rule
from dapo_megatron.types import RewardError

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True, slots=True)
class WorkerSetup:
    """What a worker needs of RewardConfig, free of pydantic: that import would triple a worker's start-up time."""

    type: str
    function: str | None
    correct_reward: float
    wrong_reward: float
    memory_limit_mib: int


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """Responses to one problem."""

    responses: tuple[str, ...]
    answer: str


def serve(connection: Connection) -> None:
    """Load the reward function, then score requests until the parent closes its end."""
    setup: WorkerSetup = connection.recv()
    try:
        function = load_reward_function(setup.type, setup.function)
    except RewardError as error:
        connection.send(RewardError(str(error)))  # without its cause, which may not be picklable
        return
    judge = Judge(function, setup.correct_reward, setup.wrong_reward, stated_answer_rule(setup.type))
    _limit_memory_growth(setup.memory_limit_mib)
    connection.send(None)
    while True:
        try:
            request: ScoreRequest = connection.recv()
        except EOFError:
            return
        for response in request.responses:
            connection.send(judge.score(response, request.answer))


def _limit_memory_growth(limit_mib: int) -> None:
    """Allocations beyond the present address space plus `limit_mib` raise MemoryError in this process."""
    num_pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit_bytes = num_pages * resource.getpagesize() + limit_mib * 2**20
    _, hard_limit = resource.getrlimit(resource.RLIMIT_AS)
    if hard_limit != resource.RLIM_INFINITY:
        limit_bytes = min(limit_bytes, hard_limit)
    resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, hard_limit))


def _die_with_parent() -> None:
    """Have the kernel kill this process when its parent is gone, even in the middle of an endless computation."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    """Entry of the process; the only argument is the number of the inherited socket."""
    _die_with_parent()
    sys.path.append(os.getcwd())  # where a user's `reward.function` may lie
    with Connection(int(sys.argv[1])) as connection:
        serve(connection)


if __name__ == "__main__":
    main()
