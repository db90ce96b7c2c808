"""What Slurm says, by its own commands. Every value is an argument of its own: no shell is in between."""

from __future__ import annotations

import re
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from dapo_megatron.config.slurm_text import seconds_of
from dapo_megatron.types import SchedulerError

ENDED = frozenset(
    {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT"}
)
"""States that a job does not leave."""
ANSWER_SECONDS = 60.0
BUSY_SECONDS, AGAIN_SECONDS = 20.0, 1.0
"""How long, and after which time, a controller that is too busy to answer is asked again."""
_BUSY = re.compile(r"[Ss]ocket|Unable to contact slurm controller|Zero Bytes were transmitted|Message (receive|send) failure")


@dataclass(frozen=True, slots=True)
class Job:
    """A job or one element of an array."""

    job_id: str
    """`17`, or `17_2` for an element."""
    state: str
    reason: str | None
    """Why it is pending, or why it ended; None when Slurm has nothing to say."""
    nodes: str
    """`node[1-2]`; empty before it runs."""
    num_restarts: int
    run_seconds: int
    log: Path | None
    working_dir: Path | None
    """Of the batch script: the run folder, or the sweep's."""
    starts: str | None
    """When Slurm means to start a pending job."""
    ends: str | None = None
    """When a running job reaches its time limit; when an ended one ended."""

    @property
    def ended(self) -> bool:
        """Slurm does nothing more with it."""
        return self.state in ENDED


@dataclass(frozen=True, slots=True)
class Node:
    """What a node has."""

    cpus: int
    gpus: int


@dataclass(frozen=True, slots=True)
class Partition:
    """Limits of a partition, and its nodes."""

    name: str
    is_default: bool
    """Where a job goes that names none."""
    up: bool
    max_seconds: int | None
    max_nodes: int | None
    nodes: tuple[Node, ...]


def submit(script: Path, folder: Path) -> str:
    """Hand in `script` with `folder` as the working directory; the job's id."""
    return _slurm("sbatch", "--parsable", f"--chdir={folder}", str(script)).strip().partition(";")[0]


def find_job(job_id: str) -> Job | None:
    """None: Slurm has forgotten it, or never knew."""
    done = _ask("scontrol", "show", "job", "--details", job_id)
    if done.returncode:
        if "Invalid job id" in done.stderr:
            return None
        raise SchedulerError(f"scontrol show job {job_id}: {done.stderr.strip()}")
    return _parse_job(job_id, done.stdout)


def accounted_state(job_id: str) -> str | None:
    """How a job ended that `find_job` does not find any more; None where the cluster keeps no accounts."""
    done = _run("sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={job_id}", "--format=State")
    lines = done.stdout.split("\n")
    return lines[0] if done.returncode == 0 and lines[0] else None


def partitions() -> dict[str, Partition]:
    """All that this user sees, by name."""
    nodes: dict[str, list[Node]] = {}
    for line in _answer("sinfo", "--noheader", "--Node", "--format=%R|%N|%c|%G").splitlines():
        name, _, cpus, resources = line.split("|", 3)
        nodes.setdefault(name, []).append(Node(int(cpus), _num_gpus(resources)))
    found = {}
    for line in _answer("scontrol", "show", "partition", "--oneliner").splitlines():
        fields = _fields(line)
        name = fields["PartitionName"]
        max_nodes = fields["MaxNodes"]
        found[name] = Partition(
            name=name,
            is_default=fields["Default"] == "YES",
            up=fields["State"] == "UP",
            max_seconds=seconds_of(fields["MaxTime"]),
            max_nodes=None if max_nodes == "UNLIMITED" else int(max_nodes),
            nodes=tuple(nodes.get(name, ())),
        )
    return found


def own_working_dirs() -> list[Path]:
    """Of this user's jobs in the queue, each once."""
    return [Path(line) for line in dict.fromkeys(_answer("squeue", "--noheader", "--me", "--format=%Z").splitlines())]


def signal_batch(job_id: str, signal: str) -> None:
    """To the batch script alone."""
    _slurm("scancel", f"--signal={signal}", "--batch", job_id)


def cancel(job_id: str) -> None:
    """End the job, at once."""
    _slurm("scancel", job_id)


def _parse_job(job_id: str, text: str) -> Job:
    """The first job of `scontrol show job`; of a heterogeneous one that is the leader, with the nodes of all parts.

    Only lines that begin with the wanted names are looked at: a job's name and comment may say anything.
    """
    first, *others = [
        {line.strip().partition("=")[0]: line.strip() for line in part.splitlines()} for part in text.strip().split("\n\n")
    ]
    lines, parts = first, [first, *others] if re.match(r"JobId=\d+ HetJobId=", first["JobId"]) else [first]
    state, restarts, run_time, start = (_fields(lines.get(name, "")) for name in ("JobState", "Requeue", "RunTime", "StartTime"))
    reason = state.get("Reason", "None")
    starts, ends = (None if (at := start.get(name, "Unknown")) in ("Unknown", "N/A") else at for name in ("StartTime", "EndTime"))
    log, folder = (lines.get(name, "").partition("=")[2] for name in ("StdOut", "WorkDir"))
    nodes = [part.get("NodeList", "").partition("=")[2].replace("(null)", "") for part in parts]
    return Job(
        job_id=job_id,
        state=state["JobState"],
        reason=None if reason == "None" else reason,
        nodes=",".join(filter(None, nodes)),
        num_restarts=int(restarts.get("Restarts", 0)),
        run_seconds=seconds_of(run_time.get("RunTime", "0")) or 0,
        log=Path(log) if log else None,
        working_dir=Path(folder) if folder else None,
        starts=starts,
        ends=ends,
    )


def _fields(text: str) -> dict[str, str]:
    """`Name=value` words."""
    return dict(re.findall(r"(?:^|\s)([A-Za-z]\w*)=(\S*)", text))


def _num_gpus(resources: str) -> int:
    """Of `gpu:h100:8(S:0-1),tmpdisk:100`."""
    return sum(int(number) for number in re.findall(r"(?:^|,)gpu(?::[^,:()]+)?:(\d+)", resources))


def _answer(*command: str) -> str:
    return _output(_ask(*command))


def _slurm(*command: str) -> str:
    return _output(_run(*command))


def _ask(*command: str) -> subprocess.CompletedProcess[str]:
    """A question, put again while the controller is too busy to answer."""
    end = time.monotonic() + BUSY_SECONDS
    while True:
        done = _run(*command)
        hung_up = done.returncode == -signal.SIGPIPE or (done.returncode and _BUSY.search(done.stderr))
        if not hung_up or time.monotonic() > end:
            return done
        time.sleep(AGAIN_SECONDS)


def _output(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode:
        raise SchedulerError(f"{done.args[0]}: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=ANSWER_SECONDS, check=False)
    except FileNotFoundError:
        raise SchedulerError(f"{command[0]} is not here; use a machine with the commands of Slurm, a login node") from None
    except subprocess.TimeoutExpired:
        raise SchedulerError(
            f"{command[0]} has not answered for {ANSWER_SECONDS:.0f} s; is the controller of Slurm up?"
        ) from None
