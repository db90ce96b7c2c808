"""Whole runs of the quick start as processes, what they wrote, and how to kill a part of one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.e2e.forked import Forked

REPOSITORY = Path(__file__).resolve().parents[2]
QUICKSTART = REPOSITORY / "configs" / "quickstart.yaml"
QUICKSTART_MOE = QUICKSTART.with_name("quickstart_moe.yaml")
NOT_COMPARED = ("time/", "throughput/", "checkpoint/", "eval/")


@dataclass(frozen=True)
class Done:
    """A process that has ended."""

    returncode: int
    stdout: str
    stderr: str


def quickstart(folder: Path, *overrides: str, name: str = "run") -> list[str]:
    """Arguments of a run of the quick start, for a process in `folder`, where its assets then lie too."""
    return ["train", str(QUICKSTART), "--run.dir", str(folder / name), *overrides]


def train(folder: Path, *overrides: str, name: str = "run") -> Done:
    """The run to its end."""
    return run(folder, *quickstart(folder, *overrides, name=name))


def run(folder: Path, *arguments: str, module: str = "dapo_megatron", seconds: float = 280) -> Done:
    """A command to its end, in `folder`; it is given so many seconds."""
    with TemporaryDirectory() as place:
        output, errors = Path(place, "output"), Path(place, "errors")
        with Forked(arguments, folder, output, errors, module=module) as process:
            code = process.wait(seconds)
        return Done(code, output.read_text(), errors.read_text())


def run_as_users_do(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The same in a process that is started as one of a shell is."""
    return subprocess.run(
        [sys.executable, "-m", "dapo_megatron", *arguments], cwd=folder, capture_output=True, text=True, timeout=280, check=False
    )


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def training_rows(run: Path) -> list[dict[str, Any]]:
    """The rows without what a clock decided, and without evaluations."""
    return [{name: value for name, value in row.items() if not name.startswith(NOT_COMPARED)} for row in rows(run)]


def processes_of(run: Path, kind: str = "") -> list[int]:
    """Ray processes, of the kind, that write into this run's logs."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            name = (process / "cmdline").read_bytes().split(b"\0")[0].decode()
            writes_here = os.readlink(process / "fd" / "1").startswith(str(run / "logs"))
        except (FileNotFoundError, PermissionError, ProcessLookupError):
            continue
        if writes_here and (not kind or name.startswith(f"ray::{kind}")):
            found.append(int(process.name))
    return found


def kill_one(run: Path, kind: str) -> None:
    """kill -9."""
    process, *_ = processes_of(run, kind)
    os.kill(process, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    """Processes that it started, and what these started."""
    parents = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(process.name)] = int((process / "stat").read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
    found = [pid]
    for parent in found:
        found += [child for child, its_parent in parents.items() if its_parent == parent]
    return found[1:]
