"""Ranks and engines of a forked run, without the five seconds in which each imports its packages.

Ray starts a worker by what its runtime environment names as `py_executable`: here ask_for_worker.py, which hands the worker's program,
arguments, environment, directory and open files to a process that the run forked before it began. That one forks the worker. All else
is Ray's own and the worker's own.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import select
import signal
import socket
import struct
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

import torch

ASKING = Path(__file__).with_name("ask_for_worker.py")
ADDRESS = "FORKED_WORKERS_ADDRESS"


def serve() -> None:
    """Workers of the Ray that this process starts are forked from what it is now; for as long as it lives."""
    address = f"forked-workers-{os.getpid()}"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"\0{address}")  # abstract: nothing to remove
    listener.listen(64)
    alive, mine = os.pipe()
    if os.fork() == 0:
        os.close(mine)
        _serve(listener, alive)
    os.close(alive)
    listener.close()
    os.environ |= {
        ADDRESS: address,
        "RAY_RUNTIME_ENV_HOOK": f"{__name__}.runtime_env",
        "RAY_prestart_worker_first_driver": "0",  # such workers would be of another runtime environment
    }


def runtime_env(given: dict[str, Any] | None) -> dict[str, Any]:
    """What Ray calls in `ray.init`."""
    return {**(given or {}), "py_executable": f"{sys.executable} -IS {ASKING} {os.environ[ADDRESS]}"}


def _serve(listener: socket.socket, alive: int) -> NoReturn:
    """Until the run has ended. A signal to all processes of the run is not meant for this one."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # workers that have ended are gone
    while alive not in select.select([listener, alive], [], [])[0]:
        connection, _ = listener.accept()
        if os.fork() == 0:
            _worker(listener, alive, connection)
        connection.close()
    os._exit(0)


def _worker(listener: socket.socket, alive: int, connection: socket.socket) -> NoReturn:
    """Who asked waits until the last copy of `connection` is closed, which is when this process ends."""
    code = 1
    try:
        listener.close()
        os.close(alive)
        program, *arguments = _take_over(connection)
        sys.argv[:] = [program, *arguments]
        runpy.run_path(program, run_name="__main__")
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:  # noqa: BLE001 - as an interpreter does
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _take_over(connection: socket.socket) -> list[str]:
    """Have what the process has that asked, inherited from Ray's; its program and arguments."""
    _, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    assert user == os.getuid(), "somebody else asks"
    _, files, _, _ = socket.recv_fds(connection, 1, 3)
    with connection.makefile("rb") as stream:
        wanted = json.loads(stream.read())
    for descriptor, file in enumerate(files):
        os.dup2(file, descriptor)
        os.close(file)
    os.environ.clear()
    os.environ.update(wanted["environment"])
    os.chdir(wanted["folder"])
    os.nice(wanted["niceness"] - os.nice(0))
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, wanted["blocked_signals"])
    if threads := os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))  # which torch looks at when it is loaded
    return wanted["command"]
