"""Which node an actor rank or an engine goes to. Pure arithmetic; Ray carries it out.

Ranks are numbered by megatron-core with the tensor-parallel rank varying fastest, so a tensor-parallel group is a run of neighbouring
ranks: it is put on one node, or refused. Nodes are taken in their given order (Slurm's switches), so neighbours in the numbering are
near each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dapo_megatron.types import ConfigError, EngineError

Role = Literal["any", "actor", "engine"]


@dataclass(frozen=True, slots=True)
class ClusterNode:
    """A node of the cluster; `num_slots` processes of the run fit on it: GPUs or, without any, CPUs."""

    name: str
    address: str
    num_slots: int
    role: Role = "any"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is to be placed. Colocated engines go where their ranks are and are not counted."""

    num_ranks: int
    tensor_parallel_size: int
    num_engines: int
    engine_size: int
    """GPUs of an engine; they are on one node."""
    may_span: bool = False
    """Whether a tensor-parallel group may span nodes."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Index of the node of each rank, then of each engine."""

    ranks: tuple[int, ...]
    engines: tuple[int, ...]


def spanning_problem(tensor_parallel_size: int, room: str) -> str:
    """Why no tensor-parallel group may span nodes, and what to do; `room` says what the nodes have."""
    return (
        f"actor.tensor_parallel_size ({tensor_parallel_size}) must leave every tensor-parallel group on one node, else each layer waits for "
        f"the network: {room}; use a smaller size with more actor.pipeline_parallel_size, or, where NVLink joins nodes, set "
        "cluster.tensor_parallel_across_nodes to true."
    )


def place(nodes: Sequence[ClusterNode], wanted: Wanted, *, on_gpus: bool) -> Placement:
    """EngineError when the nodes do not have the room, ConfigError when a tensor-parallel group would span GPU nodes and may not.

    GPUs are filled node by node. CPUs are only as many as a node says it has, so ranks are spread evenly over the nodes.
    """
    free = [node.num_slots for node in nodes]
    for_actor = [at for at, node in enumerate(nodes) if node.role != "engine"]
    for_engines = [at for at, node in enumerate(nodes) if node.role != "actor"]
    size = wanted.tensor_parallel_size
    num_groups = -(-wanted.num_ranks // size)
    if not on_gpus and for_actor:
        most = -(-num_groups // len(for_actor)) * size
        free = [min(number, most) if at in for_actor else number for at, number in enumerate(free)]
    ranks: list[int] = []
    for group in range(num_groups):
        at = next((at for at in for_actor if free[at] >= size), None)
        if at is not None:
            ranks += [at] * size
            free[at] -= size
            continue
        rest = [at for at in for_actor for _ in range(free[at])][:size]
        if len(rest) < size:
            raise EngineError(
                f"{wanted.num_ranks} actor ranks do not fit: {_room(nodes, for_actor)}; use fewer ranks, or more nodes."
            )
        if on_gpus and not wanted.may_span:
            raise ConfigError(spanning_problem(size, f"{_room(nodes, for_actor)}, and none has {size} left for group {group}"))
        for at in rest:
            free[at] -= 1
        ranks += rest
    engines: list[int] = []
    if not on_gpus:
        free = [node.num_slots - ranks.count(at) for at, node in enumerate(nodes)]
    for index in range(wanted.num_engines):
        fitting = [at for at in for_engines if free[at] >= wanted.engine_size]
        if not fitting:
            raise EngineError(
                f"engine {index} does not fit: it needs rollout.engine.tensor_parallel_size ({wanted.engine_size}) free places on one "
                f"node: {_room(nodes, for_engines)}, {wanted.num_ranks} of them for actor ranks; use fewer or smaller engines, or more nodes."
            )
        at = fitting[0] if on_gpus else max(fitting, key=lambda at: free[at])
        free[at] -= wanted.engine_size
        engines.append(at)
    return Placement(tuple(ranks[: wanted.num_ranks]), tuple(engines))


def _room(nodes: Sequence[ClusterNode], places: Sequence[int]) -> str:
    return ", ".join(f"{nodes[at].name} has {nodes[at].num_slots}" for at in places) or "there is no node for them"
