"""Where the processes of a run stand when a phase makes no progress: stacks by py-spy into RUN/stalls, and one line that sums them up."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DUMP_SECONDS = 30.0
"""Longest time of one dump."""
RANK = "actor rank "
"""Beginning of the names of actor ranks."""
CONTROLLER, REWARDS = "controller", "reward worker"
_CHILD = " child"
_PR_SET_PTRACER, _ANY = 0x59616D61, ctypes.c_ulong(-1)  # linux/prctl.h
_COLLECTIVES = re.compile(
    r"all_reduce|all_gather|reduce_scatter|broadcast|barrier|all_to_all|gather|scatter|reduce|send|recv|wait"
)
_OWN = "dapo_megatron/"


@dataclass(frozen=True, slots=True)
class ProcessPlace:
    """A process by the name users know it by; `node` is the address of its machine, None for this one."""

    name: str
    pid: int
    node: str | None = None


@dataclass(frozen=True, slots=True)
class Frame:
    """One call; `file` as below site-packages or the source folder."""

    function: str
    file: str
    line: int


@dataclass(frozen=True, slots=True)
class ProcessStacks:
    """What a process was found doing. `state` is that of ps: T is stopped, D waits for a disk, Z is dead."""

    name: str
    pid: int
    node: str | None
    state: str
    command: str
    threads: tuple[tuple[str, tuple[Frame, ...]], ...] = ()
    """Name of each thread, and its calls, the innermost first."""
    problem: str = ""
    """Why there are no stacks."""


DumpElsewhere = Callable[[str, Sequence[ProcessPlace]], list[ProcessStacks]]
"""`dump` on another machine, by its address."""


def let_be_inspected() -> None:
    """Let py-spy of the same user read this process where Linux allows it for descendants only (kernel.yama.ptrace_scope 1)."""
    ctypes.CDLL(None).prctl(_PR_SET_PTRACER, _ANY, 0, 0, 0)  # fails where there is no Yama, and nothing forbids it


def explain_stall(folder: Path, words: str, places: Sequence[ProcessPlace], dump_elsewhere: DumpElsewhere | None = None) -> str:
    """Write the stacks of all places, of this process and of what they started below `folder`; the line that sums them up."""
    target = folder / time.strftime("%Y%m%d_%H%M%S")
    target.mkdir(parents=True, exist_ok=True)
    nodes = list(dict.fromkeys(place.node for place in places if place.node is not None))
    here = [ProcessPlace(CONTROLLER, os.getpid()), *(place for place in places if place.node is None)]
    with ThreadPoolExecutor(max(1, len(nodes))) as pool:
        asked = [(node, pool.submit(_elsewhere, dump_elsewhere, node, places)) for node in nodes]
        found = dump(here) + [stacks for _, answer in asked for stacks in answer.result()]
    for stacks in found:
        (target / f"{re.sub(r'[^0-9A-Za-z]+', '_', stacks.name).strip('_')}_{stacks.pid}.txt").write_text(as_text(stacks))
    summary = summarize(found)
    (target / "summary.txt").write_text(f"{words}. {summary}\n")
    return f"{summary}; stacks of {len(found)} processes: {target}"


def dump(places: Sequence[ProcessPlace]) -> list[ProcessStacks]:
    """Stacks of processes of this machine and of what they started; what was stopped (SIGSTOP) goes on afterwards, so that it can be ended."""
    everything = _with_descendants(places)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(_dump_one, everything))
    for stacks in found:
        if stacks.state == "T":
            with suppress(ProcessLookupError, PermissionError):
                os.kill(stacks.pid, signal.SIGCONT)
    return [stacks for stacks in found if stacks.threads or any(stacks.pid == place.pid for place in places)]


def summarize(found: Iterable[ProcessStacks]) -> str:
    """Which actor ranks stand where: in which collective, called from which line of ours."""
    of_ranks = [stacks for stacks in found if stacks.name.startswith(RANK) and not stacks.name.endswith(_CHILD)]
    ranks = sorted(of_ranks, key=lambda it: int(it.name.removeprefix(RANK)))
    places: dict[str, list[str]] = {}
    for stacks in ranks:
        places.setdefault(_place_in_words(stacks), []).append(stacks.name.removeprefix(RANK))
    if not places:
        return "there are no actor ranks in processes of their own"
    groups = sorted(places.items(), key=lambda item: -len(item[1]))
    return "; ".join(f"{'ranks' if len(names) > 1 else 'rank'} {', '.join(names)}: {words}" for words, names in groups)


def as_text(stacks: ProcessStacks) -> str:
    """For people."""
    lines = [
        f"{stacks.name}, pid {stacks.pid} on {stacks.node or 'the controller machine'}, state {stacks.state}",
        stacks.command,
    ]
    lines += [f"no stacks: {stacks.problem}"] if stacks.problem else []
    for name, frames in stacks.threads:
        lines += ["", f"Thread {name}"]
        lines += [f"    {frame.function} ({frame.file}:{frame.line})" for frame in frames]
    return "\n".join(lines) + "\n"


def parse_stacks(text: str) -> tuple[tuple[str, tuple[Frame, ...]], ...]:
    """Threads of `py-spy dump --json`."""
    threads: list[dict[str, Any]] = json.loads(text)
    return tuple(
        (
            thread.get("thread_name") or str(thread.get("thread_id")),
            tuple(Frame(it["name"], it.get("short_filename") or it["filename"], it["line"]) for it in thread["frames"]),
        )
        for thread in threads
    )


def _place_in_words(stacks: ProcessStacks) -> str:
    if not stacks.threads:
        return f"no stacks ({stacks.problem or 'none'}), process state {stacks.state}"
    own = [(frames, at) for _, frames in stacks.threads for at, frame in enumerate(frames) if f"{_OWN}actor/" in frame.file]
    stopped = "stopped (SIGSTOP), " if stacks.state == "T" else ""
    if not own:
        return f"{stopped}waits for the controller"
    frames, at = own[0]
    collective = next(
        (
            frame.function
            for frame in reversed(frames[:at])
            if "torch/distributed" in frame.file and _COLLECTIVES.match(frame.function)
        ),
        None,
    )
    inside = f"in {collective}, called by " if collective else "in "
    return f"{stopped}{inside}{frames[at].function} ({frames[at].file}:{frames[at].line})"


def _elsewhere(dump_elsewhere: DumpElsewhere | None, node: str, places: Sequence[ProcessPlace]) -> list[ProcessStacks]:
    there = [place for place in places if place.node == node]
    if dump_elsewhere is None:
        return [ProcessStacks(place.name, place.pid, node, "?", "", problem="nobody can look there") for place in there]
    try:
        return dump_elsewhere(node, there)
    except Exception as error:  # noqa: BLE001 - a node that does not answer is a finding, not a failure of the diagnosis
        return [
            ProcessStacks(place.name, place.pid, node, "?", "", problem=f"{node} does not answer: {error}") for place in there
        ]


def _with_descendants(places: Sequence[ProcessPlace]) -> list[ProcessPlace]:
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(FileNotFoundError, ProcessLookupError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    known = {place.pid: place for place in places}
    pending = list(places)
    for place in pending:
        for pid, parent in parents.items():
            if parent == place.pid and pid not in known and (name := _name_of_child(place, pid)) is not None:
                known[pid] = ProcessPlace(name, pid, place.node)
                pending.append(known[pid])
    return list(known.values())


def _name_of_child(parent: ProcessPlace, pid: int) -> str | None:
    """None: it is no part of the run, such as Ray's own processes."""
    if parent.name == REWARDS or "dapo_megatron.rewards" in _command(pid):
        return REWARDS
    if parent.name == CONTROLLER:
        return None
    return parent.name if parent.name.endswith(_CHILD) else f"{parent.name}{_CHILD}"


def _command(pid: int) -> str:
    with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
        return (Path("/proc") / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()[:500]
    return ""


def _dump_one(place: ProcessPlace) -> ProcessStacks:
    state, command = "gone", _command(place.pid)
    with suppress(FileNotFoundError, ProcessLookupError):
        state = (Path("/proc") / str(place.pid) / "stat").read_text().rpartition(")")[2].split()[0]
    program = shutil.which("py-spy") or str(Path(sys.executable).with_name("py-spy"))
    try:
        # Reading memory alone: a process that is stopped, or that must not be, is left as it is.
        done = subprocess.run(
            [program, "dump", "--json", "--nonblocking", "--pid", str(place.pid)],
            capture_output=True,
            text=True,
            timeout=DUMP_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return ProcessStacks(place.name, place.pid, place.node, state, command, problem=f"py-spy: {error}")
    if done.returncode != 0:
        problem = (done.stderr.strip().splitlines() or ["no output"])[0]
        return ProcessStacks(place.name, place.pid, place.node, state, command, problem=f"py-spy: {problem}")
    return ProcessStacks(place.name, place.pid, place.node, state, command, threads=parse_stacks(done.stdout))
