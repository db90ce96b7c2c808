"""Starts all processes of a run under Ray, one per actor rank and one per engine, and stops them."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Awaitable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from dapo_megatron.config.checks import read_hf_config
from dapo_megatron.config.fields import either
from dapo_megatron.config.schema import Config, HfEngineConfig, SglangEngineConfig
from dapo_megatron.launcher.backends import Ranks, RayCluster
from dapo_megatron.launcher.ray.bundles import Bundles, Share, reserve
from dapo_megatron.launcher.ray.calls import Process, call, call_all
from dapo_megatron.launcher.ray.handles import RayActor, RayEngine, RayServers
from dapo_megatron.launcher.ray.processes import EngineProcess, RankProcess, ServerActor
from dapo_megatron.launcher.stall import DUMP_SECONDS, ProcessPlace, ProcessStacks, dump
from dapo_megatron.rollout.attached import Reattach, attach
from dapo_megatron.rollout.room import require_room
from dapo_megatron.rollout.routed_experts import ExpertShape
from dapo_megatron.rollout.router import Decode, Router
from dapo_megatron.types import EngineEndpoint, EngineError


@dataclass(frozen=True, slots=True)
class RayBackend:
    """The running processes."""

    actor: RayActor
    engines: tuple[Any, ...]
    """The embedded engines, or one router over all servers."""
    places: tuple[ProcessPlace, ...] = ()
    """All processes, as they were when they came up."""

    def dump_elsewhere(self, node: str, places: Sequence[ProcessPlace]) -> list[ProcessStacks]:
        """`stall.dump` on another node. Raises Ray's errors when the node does not answer."""
        options = {"num_cpus": 0, "resources": {f"node:{node}": 0.001}}
        return ray.get(ray.remote(dump).options(**options).remote(list(places)), timeout=2 * DUMP_SECONDS)


@contextmanager
def ray_backend(
    config: Config,
    logs: Path,
    ranks: Ranks = "training",
    *,
    num_engines: int | None = None,
    cluster: RayCluster | None = None,
) -> Iterator[RayBackend]:
    """Start all processes of a run or of an evaluation and, on leaving, stop them. Needs an open `ray_session`.

    `num_engines` in place of rollout.num_engines: 0 starts the actor ranks alone.
    """
    num_ranks = 0 if ranks == "none" else config.actor.world_size
    num_engines = config.rollout.num_engines if num_engines is None else num_engines
    settings = config.rollout.engine
    attached = isinstance(settings, SglangEngineConfig) and bool(settings.engine_urls)
    group, bundles = reserve(config, num_ranks, 0 if attached else num_engines, cluster)

    for log_file in logs.glob("*.log"):
        log_file.unlink()  # an engine that is started again goes on with its own

    def launch(cls: type, index: int, *args: Any) -> Process:
        return _start(cls, f"engine {index}", logs / f"engine_{index:03d}.log", group, bundles.of_engine(index), config, *args)

    servers = engines = None
    actor: list[Process] = []
    try:
        with tempfile.TemporaryDirectory() as folder:
            actor = [
                _start(
                    RankProcess,
                    f"actor rank {rank}",
                    logs / f"actor_rank_{rank:05d}.log",
                    group,
                    bundles.of_rank(rank),
                    config,
                    rank,
                )
                for rank in range(num_ranks)
            ]
            if isinstance(settings, HfEngineConfig):
                engines = [launch(EngineProcess, index) for index in range(num_engines)]
                engines_up: Any = call_all(engines, "whereabouts")
            elif attached:
                engines_up = attach(settings)
            else:
                servers = RayServers(lambda index: launch(ServerActor, index, index), num_engines)
                engines_up = _start_servers(bundles, actor, servers)
            starting = _bring_up(config, actor, engines_up, Path(folder), logs, frozen=ranks == "frozen")
            data_parallel_ranks, endpoints = asyncio.run(starting)
        handle = RayActor(actor, data_parallel_ranks, config.actor.offload)
        places = asyncio.run(_places([*actor, *(engines or ()), *(servers.processes if servers else ())]))
        if engines is not None:
            yield RayBackend(handle, tuple(RayEngine(process) for process in engines), places)
        else:
            assert isinstance(settings, SglangEngineConfig)
            asyncio.run(require_room(endpoints, _longest_request(config, ranks)))
            restart = servers.restart if servers is not None else Reattach(settings, endpoints)
            router = Router(
                endpoints,
                settings,
                _decoder(config),
                restart=restart,
                keeper=handle.held if actor else None,
                mixes_versions=config.rollout.partial_rollout,
                may_pause=not _shares_gpus(config, settings, endpoints),
                experts=ExpertShape.of(read_hf_config(config.model.path)) if settings.return_routed_experts else None,
            )
            yield RayBackend(handle, (router,), places)
    finally:
        for process in (*actor, *(engines or ()), *(servers.processes if servers else ())):
            ray.kill(process.handle)
        ray.util.remove_placement_group(group)


def _shares_gpus(config: Config, settings: SglangEngineConfig, endpoints: Sequence[EngineEndpoint]) -> bool:
    """Whether servers leave their memory to the actor while it trains, KV cache and all."""
    on_gpus = any(endpoint.device == "cuda" for endpoint in endpoints)
    return config.cluster.placement == "colocated" and not settings.engine_urls and on_gpus


def _longest_request(config: Config, ranks: Ranks) -> int:
    """Tokens of the longest prompt and response, of a training run or of an evaluation."""
    evaluates = ranks != "training" or config.eval.path is not None
    lengths = [config.max_eval_response_tokens] if evaluates else []
    lengths += [config.rollout.max_response_tokens] if ranks == "training" else []
    return config.data.max_prompt_tokens + max(lengths)


async def _places(processes: Sequence[Process]) -> tuple[ProcessPlace, ...]:
    here = ray.util.get_node_ip_address()
    found = await call_all(processes, "whereabouts")
    return tuple(
        ProcessPlace(process.name, pid, None if node == here else node)
        for process, (pid, node) in zip(processes, found, strict=True)
    )


async def _bring_up(
    config: Config, ranks: Sequence[Process], engines_up: Awaitable[Any], folder: Path, logs: Path, *, frozen: bool
) -> tuple[list[int], Any]:
    """Ranks meet and load the model; engines load it meanwhile. The data-parallel rank of each rank, and what `engines_up` gives."""
    deadline = config.cluster.startup_deadline_seconds
    engines = asyncio.ensure_future(engines_up)
    try:
        async with asyncio.timeout(deadline):
            if config.cluster.ray_address is None or not ranks:
                init_method = f"file://{folder / 'rendezvous'}"
            else:
                init_method = await call(ranks[0], ranks[0].handle.rendezvous.remote())
            started, endpoints = await asyncio.gather(call_all(ranks, "start", init_method, frozen), engines)
            return started, endpoints
    except TimeoutError:
        raise EngineError(
            f"ranks and engines did not come up within cluster.startup_deadline_seconds ({deadline:.0f}); see {logs}"
        ) from None
    finally:
        engines.cancel()


async def _start_servers(bundles: Bundles, ranks: Sequence[Process], servers: RayServers) -> list[EngineEndpoint]:
    """Each on its own GPUs or, colocated, on those of as many neighbouring ranks as it has ranks itself."""
    size = bundles.gpus_per_engine
    num_engines = len(servers.processes)
    if bundles.split or not bundles.gpu or size == 1:
        return await servers.start([None] * num_engines)
    places = await call_all(ranks, "gpus")
    gpu_ids: list[tuple[int, ...] | None] = []
    for index in range(num_engines):
        first = bundles.first_rank_of(index)
        group = places[first : first + size]
        if len(group) < size or len({node for node, _ in group}) > 1:
            raise EngineError(
                f"engine {index} cannot have its rollout.engine.tensor_parallel_size ({size}) GPUs on one node: the ranks it shares "
                f"them with are on {either(sorted({node for node, _ in group}))}; use cluster.placement split, or a smaller size."
            )
        gpu_ids.append(tuple(gpu for _, gpus in group for gpu in gpus))
    return await servers.start(gpu_ids)


def _decoder(config: Config) -> Decode:
    """Token ids to texts as the embedded engine does it."""
    from transformers import AutoTokenizer

    from dapo_megatron.rollout.texts import response_texts

    return partial(response_texts, AutoTokenizer.from_pretrained(config.model.path))


def _start(cls: type, name: str, log_file: Path, group: PlacementGroup, share: Share, *args: Any) -> Process:
    options = {
        "num_cpus": share.num_cpus,
        "num_gpus": share.num_gpus,
        "scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=share.bundle),
        "max_restarts": 0,
    }
    return Process(name, ray.remote(cls).options(**options).remote(*args, log_file.absolute()), log_file)
