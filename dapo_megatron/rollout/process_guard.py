"""Runs a command and ends it, children included, when the process that asked for it is gone.

    python -m dapo_megatron.rollout.process_guard COMMAND...

The command gets a process group of its own. The guard prints its pid, then waits for whichever comes first: the command ends
(the guard exits with its code), or the guard's standard input closes, which a dead parent does however it died. In both cases
nothing of the group is left. The guard is a child of the process that was asked for: Ray kills the children of a worker that it ends,
and a guard that were one would leave the command behind. Imports nothing but the standard library: it starts in milliseconds.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from contextlib import suppress

STOP_SECONDS = 10.0
"""Between asking the command to end and ending its group."""


def main(command: list[str]) -> int:
    """Returns the exit code of the command; for a signal the one that a shell gives."""
    if guard := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(guard, 0)[1])
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr, start_new_session=True)
    print(process.pid, flush=True)
    ended = os.pidfd_open(process.pid)
    # poll and not select: a server's environment may have many descriptors open.
    poll = select.poll()
    poll.register(ended, select.POLLIN)
    poll.register(sys.stdin, select.POLLIN | select.POLLHUP)
    hears_sigterm = signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    if not any(descriptor == ended for descriptor, _ in poll.poll()) and hears_sigterm:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
    _signal_group(process.pid, signal.SIGKILL)
    code = process.wait()
    return code if code >= 0 else 128 - code


def _signal_group(group: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
