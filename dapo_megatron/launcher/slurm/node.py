"""`job-node`: one task of srun on each node of a job. The first one is the head and runs `train`; the others hold a node of Ray for it.

    every node   facts of itself ──> head
    head         Ray's head meanwhile; when all are there: the others' Ray, an all-reduce over all, the checks (`checks.py`)
    head         `train` on that Ray; its exit code is the task's, and srun's
    others       leave, with code 0, when the head leaves: at the end of the run, or because it died

Nothing sleeps for a fixed time; whoever does not come by its deadline is named. A node that cannot be used says so to the head, which alone
decides how the job ends: srun kills all tasks when one fails, and gives the code of what it killed.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pydantic import TypeAdapter
from rich.console import Console

from dapo_megatron.config.load import load_config
from dapo_megatron.config.schema import Config
from dapo_megatron.exit_codes import ExitCode, code_of
from dapo_megatron.launcher.backends import RayCluster
from dapo_megatron.launcher.placement import ClusterNode, Role
from dapo_megatron.launcher.slurm import bandwidth
from dapo_megatron.launcher.slurm.checks import AllReduce, Gathered
from dapo_megatron.launcher.slurm.facts import NodeFacts, folder_problem, gather
from dapo_megatron.launcher.slurm.job import Job, in_topology_order
from dapo_megatron.launcher.slurm.meeting import Head, Line, find_meeting, join
from dapo_megatron.launcher.slurm.network import address_of, free_ports
from dapo_megatron.launcher.slurm.preflight import preflight, preflight_here
from dapo_megatron.launcher.slurm.ray_node import RayNode
from dapo_megatron.launcher.slurm.time_limit import asked_in_time
from dapo_megatron.launcher.stop import SIGNALS
from dapo_megatron.types import BadNodeError, EngineError

SHARED_SECONDS = 30.0
"""How long a file may take to be seen on another node."""
EXIT_CODE = "exit_code"
"""File in the folder of an attempt."""
ALL_REDUCE_SECONDS = 3.0 * bandwidth.TIMEOUT_SECONDS
LATE_SECONDS = 60.0
"""A node waits so much longer for the head than the head for it: the head names who is missing."""
LEAVE_SECONDS = 5.0
"""A node whose Ray ends waits so long for the end of the head, of which that may be the consequence."""

_FACTS = TypeAdapter(NodeFacts)


class Train(Protocol):
    """`dapo_megatron.train.run`."""

    def __call__(self, config: Config, *, check_only: bool, cluster: RayCluster | None = None) -> int: ...


@dataclass(frozen=True, slots=True)
class _Reach:
    """Where this node can be reached; with a `problem`, nowhere."""

    address: str = ""
    ports: Sequence[int] = ()
    problem: str = ""

    @classmethod
    def of(cls, job: Job, config: Config) -> _Reach:
        try:
            address = address_of(job.node.name, config.slurm.network)
            return cls(address, free_ports(address, config.slurm, seed=int(job.id)))
        except BadNodeError as error:
            return cls(problem=str(error))


def run_node(config_file: Path, train: Train) -> int:
    """The task of this node, with the settings of RUN/slurm/config.json. Returns its exit code.

    That of the first node is left in the file `exit_code` of the attempt, for the batch script.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # and in all that is started; `train` hears them
    job = Job.from_environment(os.environ)
    folder = config_file.absolute().parent / "nodes" / job.attempt
    if job.task != 0:
        return _run_task(load_config([config_file]), train, job, folder)
    code: int | None = None
    try:
        config = load_config([config_file])
        with asked_in_time(config, job.id):
            code = _run_task(config, train, job, folder)
        return code
    except Exception as error:
        code = code_of(error)
        raise
    finally:
        if code is not None:
            with suppress(OSError):  # then srun's code counts
                folder.mkdir(parents=True, exist_ok=True)
                (folder / EXIT_CODE).write_text(f"{int(code)}\n")


def _run_task(config: Config, train: Train, job: Job, folder: Path) -> int:
    if config.cluster.backend == "local":
        if config.slurm.preflight:
            preflight_here(config, Console(), job.node.name, exclude_from=folder.parent.parent)
        return train(config, check_only=False)
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ["RAY_AUTH_MODE"] = "token"
    reach = _Reach.of(job, config)
    os.environ["DAPO_NODE_ADDRESS"] = reach.address
    if job.task != 0:
        return _follow(config, job, folder, reach)
    if reach.problem:
        preflight(config, Gathered((_facts(config, job, reach),)), Console(), exclude_from=folder.parent.parent)
    return _lead(config, train, job, folder, reach)


def _lead(config: Config, train: Train, job: Job, folder: Path, reach: _Reach) -> int:
    started, console, address, ports = time.monotonic(), Console(), reach.address, reach.ports
    names = [node.name for node in job.nodes]
    others, deadline = range(1, len(names)), config.cluster.startup_deadline_seconds
    head = Head(folder / "meeting.json", address, ports[:1])
    os.environ["RAY_AUTH_TOKEN"] = head.meeting.secret
    # Closed before Ray is ended here: the others must know that their Ray did not fail, but has served.
    with closing(head), _ray(config, job, folder, address, ports[2:]) as ray, closing(head):
        facts = {0: _facts(config, job, reach)}
        hellos = head.hellos(others, deadline)
        here = time.monotonic()
        facts |= {task: _FACTS.validate_python(hello["facts"]) for task, hello in hellos.items()}
        missing = tuple(names[task] for task in others if task not in hellos)
        usable, meet = not missing and not any(it.is_cut_off for it in facts.values()), None
        if usable:
            ray.wait_until_head_listens(deadline)
            meet = _meet(address, ports[1], facts) if config.slurm.preflight else None
            head.tell_all({"ray": ray.gcs_address, "all_reduce": meet})
        if config.slurm.preflight or not usable:
            gathered = Gathered(
                nodes=tuple(facts[task] for task in sorted(facts)),
                missing=missing,
                unseen=tuple(
                    names[task]
                    for task, hello in hellos.items()
                    if not facts[task].run_folder and not _is_seen(folder, names[task], hello["canary"])
                ),
                skew_seconds={names[task]: hello["facts"]["clock"] - hello["heard"] for task, hello in hellos.items()},
                all_reduce=_all_reduce(head, meet, names) if meet else None,
            )
            preflight(config, gathered, console, exclude_from=folder.parent.parent)
        checked = time.monotonic()
        order = in_topology_order({task: facts[task].topology for task in facts})
        cluster = RayCluster(ray.gcs_address, tuple(_cluster_node(job, facts[task], task) for task in order))
        console.print(
            f"{len(names)} nodes in {here - started:.1f} s, preflight {checked - here:.1f} s",
            highlight=False,
            soft_wrap=True,
        )
        return train(config, check_only=False, cluster=cluster)


def _follow(config: Config, job: Job, folder: Path, reach: _Reach) -> int:
    deadline = config.cluster.startup_deadline_seconds + LATE_SECONDS
    meeting = find_meeting(folder / "meeting.json", deadline)
    os.environ["RAY_AUTH_TOKEN"] = meeting.secret
    facts, canary = _facts(config, job, reach), secrets.token_hex(8)
    if not facts.run_folder:
        _canary_file(folder, job.node.name).write_text(canary)
    line = join(meeting, job.task, {"canary": canary, "facts": _FACTS.dump_python(facts, mode="json")}, deadline)
    try:
        what = line.receive()
        if what is None:
            return ExitCode.DONE  # the head has left, and says why
        with _ray(config, job, folder, reach.address, reach.ports[2:], head=what["ray"]) as ray:
            if what["all_reduce"] is not None:
                line.send(_reduce_here(job.task, what["all_reduce"], job.node.name))
            return _hold(line, ray)
    except OSError:  # the head is gone
        return ExitCode.DONE
    finally:
        line.close()


def _hold(line: Line, ray: RayNode) -> int:
    """Until the head parts. EngineError when Ray ends before."""
    parted = threading.Event()

    def listen() -> None:
        while line.receive() is not None:
            pass
        parted.set()

    threading.Thread(target=listen, daemon=True).start()
    while not parted.wait(0.5):
        try:
            ray.require_alive()
        except EngineError:
            if parted.wait(LEAVE_SECONDS):
                break
            raise
    return ExitCode.DONE


@contextmanager
def _ray(
    config: Config, job: Job, folder: Path, address: str, ports: Sequence[int], head: str | None = None
) -> Iterator[RayNode]:
    node = RayNode(config, job.node.name, address, ports, folder / f"{job.node.name}.ray.log", head)
    try:
        yield node
    finally:
        node.stop()


def _facts(config: Config, job: Job, reach: _Reach) -> NodeFacts:
    return gather(
        job.node.name,
        reach.address,
        group=job.node.group,
        network=reach.problem,
        run_folder=folder_problem(config.run.dir),
        topology=job.topology,
    )


def _cluster_node(job: Job, facts: NodeFacts, task: int) -> ClusterNode:
    roles: dict[int, Role] = {0: "actor", 1: "engine"}
    is_mixed = len({node.group for node in job.nodes}) > 1
    return ClusterNode(facts.name, facts.address, len(facts.gpus or ()), roles[job.nodes[task].group] if is_mixed else "any")


def _canary_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.canary"


def _is_seen(folder: Path, name: str, canary: str) -> bool:
    """Whether what a node wrote is there, for the head too."""
    end = time.monotonic() + SHARED_SECONDS
    file = _canary_file(folder, name)
    while True:
        os.listdir(folder)
        if file.is_file() and file.read_text() == canary:
            return True
        if time.monotonic() > end:
            return False
        time.sleep(0.1)


def _meet(address: str, port: int, facts: Mapping[int, NodeFacts]) -> dict[str, Any]:
    """What each node must know for the all-reduce; `counts`: processes by task, one a GPU or else one a node."""
    on_gpus = all(it.gpus for it in facts.values())
    counts = [len(facts[task].gpus or ()) if on_gpus else 1 for task in sorted(facts)]
    return {"address": address, "port": port, "counts": counts, "on_gpus": on_gpus}


def _all_reduce(head: Head, meet: Mapping[str, Any], names: Sequence[str]) -> AllReduce | None:
    counts = meet["counts"]
    if sum(counts) == 1:
        return None
    own = _reduce_here(0, meet, names[0])
    answers, silent = head.answers(ALL_REDUCE_SECONDS)
    answers[0] = own
    errors = {names[task]: answer["error"] for task, answer in sorted(answers.items()) if answer["error"]}
    errors |= {names[task]: problem for task, problem in silent.items()}
    speed = min((answer["gigabytes_per_second"] for answer in answers.values()), default=0.0)
    return AllReduce("nccl" if meet["on_gpus"] else "gloo", len(counts), sum(counts), speed, errors)


def _reduce_here(task: int, meet: Mapping[str, Any], name: str) -> dict[str, Any]:
    """This node's processes of the all-reduce, to their end."""
    counts = meet["counts"]
    first, world = sum(counts[:task]), sum(counts)
    if world == 1:
        return {"error": "", "gigabytes_per_second": 0.0}
    processes = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", bandwidth.__name__, meet["address"], str(meet["port"])),
                *(str(first + local), str(world), str(local) if meet["on_gpus"] else "cpu"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for local in range(counts[task])
    ]
    speeds, errors, end = [], [], time.monotonic() + ALL_REDUCE_SECONDS - 10
    for local, process in enumerate(processes):
        try:
            out, err = process.communicate(timeout=max(end - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            errors.append(f"process {local} did not end in time")
            continue
        if process.returncode == 0:
            speeds.append(json.loads(out.splitlines()[-1])["gigabytes_per_second"])
        else:
            lines = err.strip().splitlines() or [f"code {process.returncode}"]
            errors.append(f"process {local}: {lines[-1]}")
    return {"error": "; ".join(errors), "gigabytes_per_second": min(speeds, default=0.0)}
