"""Which node, CPUs and GPUs each process of a run gets."""

from __future__ import annotations

from dataclasses import dataclass, replace

import ray
from ray.util.placement_group import PlacementGroup, placement_group

from dapo_megatron.config.schema import Config, SglangEngineConfig
from dapo_megatron.launcher.backends import RayCluster
from dapo_megatron.launcher.placement import ClusterNode, Wanted, place
from dapo_megatron.launcher.ray.session import alive_nodes
from dapo_megatron.types import EngineError


@dataclass(frozen=True, slots=True)
class Share:
    """What a process takes of the placement bundle `bundle`."""

    bundle: int
    num_cpus: float
    num_gpus: float


@dataclass(frozen=True, slots=True)
class Bundles:
    """Who gets what of the placement group."""

    num_ranks: int
    share: float
    """Of a bundle, for each process on it."""
    gpu: bool
    split: bool
    gpus_per_engine: int

    def of_rank(self, rank: int) -> Share:
        """Of an actor rank."""
        return self._share(rank, 1)

    def of_engine(self, index: int) -> Share:
        """Of an engine: a bundle of its own, or a part of a rank's."""
        if self.split:
            return self._share(self.num_ranks + index, self.gpus_per_engine)
        return self._share(self.first_rank_of(index), 1)

    def first_rank_of(self, index: int) -> int:
        """Colocated: the rank whose bundle the engine shares; its other GPUs are those of the ranks that follow."""
        return index * self.gpus_per_engine % self.num_ranks

    def _share(self, bundle: int, num_gpus: int) -> Share:
        return Share(bundle, self.share, self.share * num_gpus if self.gpu else 0)


def reserve(config: Config, ranks: int, engines: int, cluster: RayCluster | None) -> tuple[PlacementGroup, Bundles]:
    """One bundle a rank; engines share them when colocated, else have their own. Over several nodes each bundle has its node."""
    split = config.cluster.placement == "split" or ranks == 0
    gpu = ray.cluster_resources().get("GPU", 0) > 0
    settings = config.rollout.engine
    size = settings.tensor_parallel_size if isinstance(settings, SglangEngineConfig) else 1
    num_gpus = [1] * ranks + [size] * (engines if split else 0)
    most_on_a_bundle = 1 if split else 1 + -(-engines * size // ranks)
    wanted = [{"CPU": 1.0, **({"GPU": float(count)} if gpu else {})} for count in num_gpus]
    for bundle, address in zip(wanted, _addresses(config, ranks, engines if split else 0, size, cluster, gpu=gpu), strict=True):
        bundle |= {f"node:{address}": 0.001} if address is not None else {}
    group = placement_group(wanted or [{"CPU": 0.01}], strategy="PACK")
    if not group.wait(config.cluster.startup_deadline_seconds):
        ray.util.remove_placement_group(group)
        raise EngineError(
            f"the Ray cluster cannot place {len(num_gpus)} processes of 1 CPU each"
            f"{f' and {sum(num_gpus)} GPUs' if gpu else ''}; it has {ray.cluster_resources()}"
        )
    return group, Bundles(ranks, 1.0 / most_on_a_bundle, gpu, split, size)


def _addresses(
    config: Config, ranks: int, engines: int, engine_size: int, cluster: RayCluster | None, *, gpu: bool
) -> list[str | None]:
    """The node of each rank, then of each engine with a bundle of its own; None on one machine."""
    alive = alive_nodes()
    if len(alive) < 2 or not ranks:
        return [None] * (ranks + engines)
    known = (
        cluster.nodes if cluster is not None else [ClusterNode(address, address, 0) for address in sorted(alive, key=_by_number)]
    )
    nodes = [replace(node, num_slots=int(alive[node.address].get("GPU" if gpu else "CPU", 0))) for node in known]
    sizes = Wanted(
        num_ranks=ranks,
        tensor_parallel_size=config.actor.tensor_parallel_size,
        num_engines=engines,
        engine_size=engine_size,
        may_span=config.cluster.tensor_parallel_across_nodes,
    )
    placement = place(nodes, sizes, on_gpus=gpu)
    return [nodes[at].address for at in (*placement.ranks, *placement.engines)]


def _by_number(address: str) -> list[int]:
    return [int(part) for part in address.split(".")]
