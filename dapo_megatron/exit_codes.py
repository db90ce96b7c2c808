"""What the exit code of `dapo-megatron` says, to people and to job scripts: whether starting again is worth it."""

from __future__ import annotations

from enum import IntEnum

from dapo_megatron.types import (
    BadNodeError,
    CheckpointError,
    ConfigError,
    DapoMegatronError,
    DataError,
    LogProbError,
    MappingError,
    RewardError,
    SignalError,
    StalledError,
)


class ExitCode(IntEnum):
    """0 is success; those from 85 on are for runs. `MEANINGS` has the words."""

    DONE = 0
    FAILED = 1
    BAD_INPUT = 2
    STOPPED = 85
    STALLED = 86
    BAD_NODE = 87


MEANINGS: dict[ExitCode, str] = {
    ExitCode.DONE: "the run is at its end",
    ExitCode.FAILED: "it failed and may go better next time: a rank, an engine or a node died, a gradient was not finite, a stop was not saved",
    ExitCode.BAD_INPUT: "it would only fail again: mend configuration, data, reward function, checkpoint or code first",
    ExitCode.STOPPED: "told to stop (SIGUSR1 or SIGTERM); all finished steps are in a complete checkpoint, the same command goes on",
    ExitCode.STALLED: "a phase made no progress; RUN/stalls says which, and where every process stood",
    ExitCode.BAD_NODE: "a node did not pass the preflight; it is named, and nothing was started",
}

_REPEATS = (ConfigError, DataError, RewardError, CheckpointError, MappingError, SignalError, LogProbError)
_MAY_PASS = (DapoMegatronError, OSError, MemoryError)


def code_of(error: Exception) -> ExitCode:
    """The exit code of a run that ended with this error; one that nobody foresaw is a fault of the code and would come again."""
    if isinstance(error, StalledError):
        return ExitCode.STALLED
    if isinstance(error, BadNodeError):
        return ExitCode.BAD_NODE
    if isinstance(error, _REPEATS):
        return ExitCode.BAD_INPUT
    is_of_ray = type(error).__module__.partition(".")[0] == "ray"  # a part of the cluster is gone
    return ExitCode.FAILED if is_of_ray or isinstance(error, _MAY_PASS) else ExitCode.BAD_INPUT
