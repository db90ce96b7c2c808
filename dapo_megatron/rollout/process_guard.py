"""Runs a command and ends it, children included, when the process that asked for it is gone.

    python -m dapo_megatron.rollout.process_guard [--clean FOLDER] COMMAND...

The command gets a process group of its own. The guard prints its pid, then waits for whichever comes first: the command ends
(the guard exits with its code), or the guard's standard input closes, which a dead parent does however it died. In both cases
nothing of the group is left. The guard is a child of the process that was asked for: Ray kills the children of a worker that it ends,
and a guard that were one would leave the command behind. Imports nothing but the standard library: it starts in milliseconds.

With --clean, FOLDER is removed when the group is gone, and so is what its processes had in /dev/shm under names of their own: servers end
theirs with SIGKILL, which leaves it there. The guard looks for it when it reads something on its standard input (the command is up),
and prints "seen".
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

STOP_SECONDS = 10.0
"""Between asking the command to end and ending its group."""
SHARED_MEMORY = Path("/dev/shm")
OWN_NAMES = ("sgl_shm_", "sglang_loads_", "sem.mp-")
"""What SGLang and Python's semaphores are called there. Weights on their way from the actor are not the group's to remove."""


def main(command: list[str]) -> int:
    """Returns the exit code of the command; for a signal the one that a shell gives."""
    folder = None
    if command[0] == "--clean":
        folder, command = Path(command[1]), command[2:]
    if guard := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(guard, 0)[1])
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr, start_new_session=True)
    _say(f"{process.pid}")
    ended = os.pidfd_open(process.pid)
    # poll and not select: a server's environment may have many descriptors open.
    poll = select.poll()
    poll.register(ended, select.POLLIN)
    poll.register(sys.stdin, select.POLLIN | select.POLLHUP)
    hears_sigterm = signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    left_behind: set[Path] = set()
    is_held = True
    while is_held and not any(descriptor == ended for descriptor, _ in poll.poll()):
        is_held = bool(os.read(sys.stdin.fileno(), 4096))
        if is_held and folder is not None:
            left_behind = shared_memory_of(process.pid)
            _say("seen")
    if not is_held and hears_sigterm:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
    _signal_group(process.pid, signal.SIGKILL)
    code = process.wait()
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
        for file in left_behind:
            with suppress(OSError):
                file.unlink(missing_ok=True)
    return code if code >= 0 else 128 - code


def shared_memory_of(group: int) -> set[Path]:
    """Files that the processes of a group have mapped under names of their own."""
    files = set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile, or is another user's
            if os.getpgid(int(process.name)) != group:
                continue
            for line in (process / "maps").read_text(errors="replace").splitlines():
                _, found, name = line.partition(f" {SHARED_MEMORY}/")
                if found and name.startswith(OWN_NAMES):
                    files.add(SHARED_MEMORY / name.removesuffix(" (deleted)"))
    return files


def _say(line: str) -> None:
    """Nobody listens any more where the holder has died since; the command is still to be ended then."""
    with suppress(OSError):
        os.write(sys.stdout.fileno(), f"{line}\n".encode())


def _signal_group(group: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
