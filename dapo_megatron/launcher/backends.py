"""Where the processes of a run live: under Ray, or all in this one (`cluster.backend`)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dapo_megatron.config.schema import Config
from dapo_megatron.launcher.placement import ClusterNode

if TYPE_CHECKING:
    from dapo_megatron.launcher.local_backend import LocalBackend
    from dapo_megatron.launcher.ray.backend import RayBackend

Ranks = Literal["training", "frozen", "none"]
"""What the actor ranks are for: to train; to hold the weights of a checkpoint; not started at all."""


@dataclass(frozen=True, slots=True)
class RayCluster:
    """A Ray that was started for the run: its address, and its nodes in the order in which ranks are numbered over them."""

    address: str
    nodes: tuple[ClusterNode, ...]


def session(config: Config, cluster: RayCluster | None = None) -> AbstractContextManager[None]:
    """What `backend` needs around it; a restarted run stays in it. With `cluster`: once all its nodes are there."""
    if config.cluster.backend == "local":
        return nullcontext()
    from dapo_megatron.launcher.ray.session import ray_session

    return ray_session(config, cluster)


@contextmanager
def backend(
    config: Config, logs: Path, ranks: Ranks = "training", *, cluster: RayCluster | None = None
) -> Iterator[RayBackend | LocalBackend]:
    """Start the actor ranks and the engines of a run or of an evaluation and, on leaving, stop them."""
    if config.cluster.backend == "local":
        from dapo_megatron.launcher.local_backend import local_backend

        with local_backend(config, ranks) as processes:
            yield processes
        return
    from dapo_megatron.launcher.ray.backend import ray_backend

    with ray_backend(config, logs, ranks, cluster=cluster) as ray_processes:
        yield ray_processes


@asynccontextmanager
async def connections(engines: Sequence[Any]) -> AsyncIterator[None]:
    """Around the use of engines in one event loop: on leaving, their connections are closed."""
    try:
        yield
    finally:
        await asyncio.gather(*(engine.close() for engine in engines))
