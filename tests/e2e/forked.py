"""`python -m dapo_megatron` without the ten seconds in which it imports its packages.

The process is forked from the fork server of tests/distributed/ranks.py, which has imported them. All else is its own, as it is of a
process that a shell starts: arguments, environment, directory, output files, signals, exit code. Its ranks and engines are forked as
well, see forked_workers.py. The whole run of conftest.py and the jobs of tests/slurm start as users start them.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.distributed.ranks import CONTEXT
from tests.e2e import forked_workers


class Forked:
    """`python -m MODULE ARGUMENTS`, run in `folder`; what it writes goes to files. A subset of subprocess.Popen."""

    def __init__(
        self,
        arguments: Sequence[str],
        folder: Path,
        output: Path,
        errors: Path | None = None,
        *,
        module: str = "dapo_megatron",
        environment: Mapping[str, str] | None = None,
    ):
        """Standard error goes to `errors`, or to `output` too. `environment`: this process's."""
        self.args = [module, *arguments]
        files = (output, errors or output)
        self._process = CONTEXT.Process(
            target=_main, args=(module, list(arguments), folder, files, dict(environment or os.environ))
        )
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, less than 0 when a signal ended it."""
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """It does not outlive a test that fails."""
        if kind is not None:
            self.kill()
        self.wait()


def _main(module: str, arguments: list[str], folder: Path, files: Sequence[Path], environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, path in zip((1, 2), files, strict=True):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, descriptor)
        os.close(file)
    os.chdir(folder)
    sys.argv[1:] = arguments
    forked_workers.serve()
    multiprocessing.set_start_method(None, force=True)  # the default
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # which multiprocessing leaves out
