"""What Slurm tells a task about its job: which nodes, in which order, and which of them is this one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from dapo_megatron.types import ConfigError

_ENTRY = re.compile(r"([^,\[]|\[[^\]]*\])+")
_RANGES = re.compile(r"\[([^\]]*)\]")


@dataclass(frozen=True, slots=True)
class JobNode:
    """One node of a job. `group` is its part of a heterogeneous job: 0 the actor ranks, 1 the engines."""

    name: str
    group: int = 0


@dataclass(frozen=True, slots=True)
class Job:
    """The job as one of its tasks sees it; `nodes[task]` is the node of a task."""

    id: str
    restart: int
    nodes: tuple[JobNode, ...]
    task: int
    topology: str = ""
    """Switches above this node, the highest first, e.g. `s0.s3.node7`; empty where Slurm knows no topology."""

    @property
    def attempt(self) -> str:
        """A name that no other attempt of any job has."""
        return f"{self.id}_{self.restart}"

    @property
    def node(self) -> JobNode:
        """Of this task."""
        return self.nodes[self.task]

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Job:
        """ConfigError outside a job step."""
        try:
            num_groups = int(environment.get("SLURM_HET_SIZE", "0"))
            lists = [environment[f"SLURM_JOB_NODELIST_HET_GROUP_{group}"] for group in range(num_groups)]
            lists = lists or [environment["SLURM_JOB_NODELIST"]]
            nodes = tuple(JobNode(name, group) for group, names in enumerate(lists) for name in expand_node_list(names))
            return cls(
                id=environment["SLURM_JOB_ID"],
                restart=int(environment.get("SLURM_RESTART_COUNT", "0")),
                nodes=nodes,
                task=int(environment["SLURM_PROCID"]),
                topology=environment.get("SLURM_TOPOLOGY_ADDR", ""),
            )
        except KeyError as missing:
            raise ConfigError(
                f"{missing.args[0]} is not set: `job-node` runs as one task of srun on each node of a job; use `dapo-megatron submit`, or "
                "`dapo-megatron train` outside Slurm."
            ) from None


def expand_node_list(text: str) -> list[str]:
    """`gpu[01-03,7],login` as names; the short form of Slurm, whose own tools may not exist in a container."""
    return [name for entry in _ENTRY.finditer(text) for name in _expand(entry[0])]


def in_topology_order(addresses: Mapping[int, str]) -> list[int]:
    """Tasks so that nodes below one switch are neighbours (`addresses`: task -> Job.topology); without switches by number of the task."""
    return sorted(addresses, key=lambda task: (addresses[task].split(".")[:-1], task))


def _expand(entry: str) -> Iterator[str]:
    found = _RANGES.search(entry)
    if found is None:
        yield entry
        return
    for part in found[1].split(","):
        first, _, last = part.partition("-")
        for number in range(int(first), int(last or first) + 1):
            yield from _expand(f"{entry[: found.start()]}{number:0{len(first)}d}{entry[found.end() :]}")
