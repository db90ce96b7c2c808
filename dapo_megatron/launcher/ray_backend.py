"""The run's processes under Ray: one per actor rank, one per engine. The only file that imports ray.

Each process writes its output to a file of its own in RUN/logs. A call to several processes fails with the process that died first
(the others then report broken connections), its name and its last log lines.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from dapo_megatron.actor.probed import Probed
from dapo_megatron.actor.replayed import Replay
from dapo_megatron.config.checks import read_hf_config
from dapo_megatron.config.fields import either
from dapo_megatron.config.schema import Config, HfEngineConfig, SglangEngineConfig
from dapo_megatron.launcher.backends import Ranks, RayCluster
from dapo_megatron.launcher.held_weights import HeldWeights
from dapo_megatron.launcher.imports import without_collection
from dapo_megatron.launcher.placement import ClusterNode, Wanted, place
from dapo_megatron.launcher.rank import build_rank
from dapo_megatron.launcher.server_process import ServerProcess
from dapo_megatron.launcher.slurm.network import interface_of
from dapo_megatron.launcher.stall import DUMP_SECONDS, ProcessPlace, ProcessStacks, dump, let_be_inspected
from dapo_megatron.rollout.attached import Reattach, attach
from dapo_megatron.rollout.engine import GenerateRequest, GenerateResult
from dapo_megatron.rollout.room import require_room
from dapo_megatron.rollout.routed_experts import ExpertShape
from dapo_megatron.rollout.router import Decode, Router
from dapo_megatron.rollout.sglang_server import free_port
from dapo_megatron.types import DapoMegatronError, EngineEndpoint, EngineError, TrainBatch, WorkerDiedError
from dapo_megatron.weights.file_digest import FileDigest
from dapo_megatron.weights.sync import WeightBucket, WeightManifest
from dapo_megatron.weights.transports.records import PushReport

NUM_LOG_LINES = 15
"""Log lines quoted when a process dies."""
GRACE_SECONDS = 5.0
"""After the first failure: how long to wait for the process that caused it to be reported."""
BUCKETS_IN_FLIGHT = 2
"""Weight buckets that may exist at the same time."""


class RankProcess:
    """One actor rank, in a process of its own."""

    def __init__(self, config: Config, rank: int, log_file: Path):
        _settle_in(log_file)
        self._config, self._rank = config, rank

    def whereabouts(self) -> tuple[int, str]:
        return _whereabouts()

    def gpus(self) -> tuple[str, tuple[int, ...]]:
        """Address of the node, and the GPUs of it that are this rank's."""
        return ray.util.get_node_ip_address(), tuple(int(gpu) for gpu in ray.get_gpu_ids())

    def rendezvous(self) -> str:
        """An address on this process's node where ranks can meet."""
        host = ray.util.get_node_ip_address()
        return f"tcp://{host}:{free_port(host)}"  # one that no outgoing connection takes while the ranks import

    def start(self, init_method: str, frozen: bool) -> int:
        """Join the other ranks. Returns this rank's data-parallel rank."""
        if init_method.startswith("tcp:") and (interface := interface_of(ray.util.get_node_ip_address())):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)  # else gloo takes what the host name means, maybe loopback
            os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
        self._worker = build_rank(self._config, rank=self._rank, init_method=init_method, frozen=frozen)
        from dapo_megatron.actor import parallel

        return parallel.data_parallel_rank()

    def train(self, batch: TrainBatch, rollout_step: int) -> dict[str, float]:
        return self._worker.train(batch, rollout_step)

    def replay(self, batch: TrainBatch, rollout_step: int) -> Replay | None:
        from dapo_megatron.actor.replay import replay

        return replay(self._worker, batch, rollout_step)

    def probe(self, batch: TrainBatch, rollout_step: int) -> Probed:
        from dapo_megatron.actor.probe import probe

        return probe(self._worker, batch, rollout_step)

    def send_weights(self, version: int) -> Iterator[WeightBucket | WeightManifest]:
        yield from self._worker.send_weights(version)

    def push_weights(self, version: int, endpoints: Sequence[EngineEndpoint]) -> PushReport | None:
        node, gpu_ids = self.gpus()
        return self._worker.push_weights(version, endpoints, node, gpu_ids[0] if gpu_ids else None)

    def make_room(self) -> dict[str, float]:
        return self._worker.make_room()

    def start_save(self, directory: Path) -> None:
        self._worker.start_save(directory)

    def save_is_written(self) -> bool:
        return self._worker.save_is_written()

    def finish_save(self) -> dict[str, FileDigest]:
        return self._worker.finish_save()

    def load(self, directory: Path, digests: Mapping[str, FileDigest], allow_canary: bool) -> None:
        self._worker.load(directory, digests, allow_canary)

    def load_weights(self, directory: Path, digests: Mapping[str, FileDigest]) -> None:
        self._worker.load_weights(directory, digests)


class ServerActor(ServerProcess):
    """One SGLang server, held by a process on its node."""

    def whereabouts(self) -> tuple[int, str]:
        return _whereabouts()

    def __init__(self, config: Config, index: int, log_file: Path):
        _settle_in(log_file)
        super().__init__(config, index, log_file)

    def start_here(self, gpu_ids: tuple[int, ...] | None) -> EngineEndpoint:
        """`start` with the address and the device of this node."""
        host = "127.0.0.1" if self._config.cluster.ray_address is None else ray.util.get_node_ip_address()
        seen = gpu_ids or tuple(int(gpu) for gpu in ray.get_gpu_ids())
        return replace(self.start(host, "cuda" if seen else "cpu", gpu_ids), gpu_ids=seen)


class EngineProcess:
    """One embedded engine, in a process of its own."""

    def __init__(self, config: Config, log_file: Path):
        _settle_in(log_file)
        settings = config.rollout.engine
        assert isinstance(settings, HfEngineConfig)
        threads = settings.num_threads or max(1, (os.cpu_count() or 1) // config.rollout.num_engines)
        with without_collection():
            import torch

            from dapo_megatron.rollout.hf_engine import HfEngine

            device = "cuda" if torch.cuda.is_available() else "cpu"
            self._engine = HfEngine(config.model.path, settings, threads, device)

    async def whereabouts(self) -> tuple[int, str]:
        return _whereabouts()

    async def generate(self, requests: Sequence[GenerateRequest]) -> AsyncIterator[list[GenerateResult]]:
        async for results in self._engine.generate_together(requests):
            yield results

    async def abort(self, request_ids: Collection[int]) -> None:
        await self._engine.abort(request_ids)

    async def receive(self, message: WeightBucket | WeightManifest) -> int:
        return await self._engine.receive(message)


@dataclass(frozen=True, slots=True)
class Process:
    """A Ray actor with the name users know it by."""

    name: str
    handle: Any
    log_file: Path

    def died(self, reason: object) -> WorkerDiedError:
        lines = self.log_file.read_text(errors="replace").splitlines() if self.log_file.is_file() else []
        tail = "\n".join(f"    {line}" for line in lines[-NUM_LOG_LINES:])
        return WorkerDiedError(f"{self.name} died ({reason}). Last lines of {self.log_file}:\n{tail or '    (empty)'}")


class RayActor:
    """All actor ranks as one handle; every call runs on all of them."""

    def __init__(self, processes: Sequence[Process], data_parallel_ranks: Sequence[int], offloads: bool = False):
        """`data_parallel_ranks[i]` is the one of `processes[i]`; `offloads` is actor.offload."""
        self._offloads = offloads
        self.processes, self._data_parallel_ranks = tuple(processes), tuple(data_parallel_ranks)
        self.held = HeldWeights(self.push_weights)

    async def train(self, batch: TrainBatch, rollout_step: int) -> dict[str, float]:
        """Metrics of the actor."""
        self._take_devices()
        with self.held.while_training(rollout_step):
            return (await self._on_shares("train", batch, rollout_step))[0]

    async def replay(self, batch: TrainBatch, rollout_step: int) -> Replay:
        """Train on the batch and bring back what no layout may change."""
        return (await self._on_shares("replay", batch, rollout_step))[0]

    async def probe(self, batch: TrainBatch, rollout_step: int) -> list[Probed]:
        """Time the optimizer steps of the batch but the first, which warms up; what each rank measured."""
        return await self._on_shares("probe", batch, rollout_step)

    async def send_weights(self, version: int) -> AsyncIterator[Any]:
        """References to weight messages in the object store, rank 0's; the other ranks feed it."""
        options = {"num_returns": "streaming", "_generator_backpressure_num_objects": BUCKETS_IN_FLIGHT}
        first, *others = self.processes
        stream = first.handle.send_weights.options(**options).remote(version)
        feeding = [
            asyncio.ensure_future(_exhaust(process, process.handle.send_weights.options(num_returns="streaming").remote(version)))
            for process in others
        ]
        try:
            async for reference in stream:
                yield reference
            await _first_failure([asyncio.ensure_future(_call(first, stream.completed())), *feeding])
        except RayError as error:
            raise _in_words(first, error) from error
        finally:
            for task in feeding:
                task.cancel()

    async def push_weights(self, version: int, endpoints: Sequence[EngineEndpoint]) -> PushReport:
        """Bring the present weights to rollout servers; servers that failed are in the report."""
        self.held.are(version)
        report: PushReport = (await self._on_all("push_weights", version, endpoints))[0]
        return report

    async def make_room(self) -> dict[str, float]:
        """Leave the devices to the engines, see `ActorWorker.make_room`; rank 0's metrics."""
        metrics: dict[str, float] = (await self._on_all("make_room"))[0]
        self.held.let_go()
        return metrics

    async def start_save(self, directory: Path) -> None:
        """Begin to write a checkpoint in the background."""
        self._take_devices()
        await self._on_all("start_save", directory)

    async def save_is_written(self) -> bool:
        """Whether all ranks are done with their files."""
        return all(await self._on_all("save_is_written"))

    async def finish_save(self) -> dict[str, FileDigest]:
        """Complete the checkpoint; digests of the files that ranks wrote."""
        return {name: digest for digests in await self._on_all("finish_save") for name, digest in digests.items()}

    async def load(self, directory: Path, digests: Mapping[str, FileDigest], allow_canary: bool) -> None:
        """Read a checkpoint and prove that it is the one saved."""
        self._take_devices()
        await self._on_all("load", directory, digests, allow_canary)

    async def load_weights(self, directory: Path, digests: Mapping[str, FileDigest]) -> None:
        """Read a checkpoint's weights alone."""
        await self._on_all("load_weights", directory, digests)

    def stop(self) -> None:
        """End the processes and free what they hold: an evaluation needs them no more once the engines have the weights."""
        for process in self.processes:
            ray.kill(process.handle)
        self.processes = ()
        self.held.are_gone()

    def _take_devices(self) -> None:
        """What comes next has the ranks take back what they have given up; an engine that returns waits until `make_room`."""
        if self._offloads:
            self.held.keep_back()

    async def _on_shares(self, method: str, batch: TrainBatch, rollout_step: int) -> list[Any]:
        """Each rank is sent the share of its data-parallel rank, which is put into the object store once."""
        shares = {dp_rank: ray.put(batch.share(dp_rank)) for dp_rank in sorted(set(self._data_parallel_ranks))}
        args = [(shares[dp_rank], rollout_step) for dp_rank in self._data_parallel_ranks]
        return await call_each(self.processes, method, args)

    async def _on_all(self, method: str, *args: Any) -> list[Any]:
        return await call_all(self.processes, method, *args)


class RayEngine:
    """What the sampler and the controller ask of an engine, over a process; weight messages are object-store references."""

    def __init__(self, process: Process):
        self.process = process
        self.weight_version = 0

    async def generate(self, requests: Sequence[GenerateRequest]) -> AsyncGenerator[GenerateResult, None]:
        """As the engine's own."""
        try:
            async for reference in self.process.handle.generate.options(num_returns="streaming").remote(requests):
                for result in await reference:
                    yield result
        except RayError as error:
            raise _in_words(self.process, error) from error

    async def abort(self, request_ids: Collection[int]) -> None:
        """As the engine's own."""
        await _call(self.process, self.process.handle.abort.remote(request_ids))

    async def receive(self, message: Any) -> int:
        """Take the next bucket or the manifest; the bytes of weights in it."""
        return await _call(self.process, self.process.handle.receive.remote(message))

    async def close(self) -> None:
        """Nothing is open."""


class RayServers:
    """The processes that hold the SGLang servers of a run: where they stand, and how each is started again."""

    def __init__(self, launch: Callable[[int], Process], num_engines: int):
        """`launch` starts the process of an engine, by index."""
        self._launch = launch
        self.processes = [launch(index) for index in range(num_engines)]
        self._gpu_ids: list[tuple[int, ...] | None] = [None] * num_engines

    async def start(self, gpu_ids: Sequence[tuple[int, ...] | None]) -> list[EngineEndpoint]:
        """All at once. The first error of one is raised."""
        self._gpu_ids = list(gpu_ids)
        return await call_each(self.processes, "start_here", [(ids,) for ids in gpu_ids])

    async def restart(self, name: str) -> EngineEndpoint:
        """Start a server again, in a new process where its own is gone. EngineError when it does not come up."""
        index = next(i for i, process in enumerate(self.processes) if process.name == name)
        try:
            return await self._start_one(index)
        except WorkerDiedError:
            self.processes[index] = self._launch(index)
        try:
            return await self._start_one(index)
        except WorkerDiedError as error:
            raise EngineError(f"{name} cannot be started again: {error}") from error

    async def _start_one(self, index: int) -> EngineEndpoint:
        return (await call_all([self.processes[index]], "start_here", self._gpu_ids[index]))[0]


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
def ray_session(config: Config, cluster: RayCluster | None = None) -> Iterator[None]:
    """Connect to the configured Ray, or start a local one (loopback only) and stop it at the end.

    With `cluster`: EngineError that names its nodes that did not join.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if config.cluster.ray_address is None:
        options |= {
            "address": "local",
            "include_dashboard": False,
            "num_cpus": max(os.cpu_count() or 1, config.actor.world_size + config.rollout.num_engines),
            "_node_ip_address": "127.0.0.1",
        }
    else:
        options |= {"address": config.cluster.ray_address}
        if cluster is not None:  # this process is on the node of its head
            options |= {"_node_ip_address": cluster.address.rpartition(":")[0]}
    try:
        ray.init(**options)
    except Exception as error:  # ray raises bare Exception when its processes do not come up in time
        raise EngineError(
            f"Ray did not start ({error}); look at /tmp/ray/session_latest/logs, or set cluster.ray_address"
        ) from error
    try:
        if cluster is not None:
            _wait_for_nodes(cluster, config.cluster.startup_deadline_seconds)
        yield
    finally:
        ray.shutdown()


def _wait_for_nodes(cluster: RayCluster, deadline_seconds: float) -> None:
    end = time.monotonic() + deadline_seconds
    while missing := [node.name for node in cluster.nodes if node.address not in _alive_nodes()]:
        if time.monotonic() > end:
            raise EngineError(
                f"{', '.join(missing)} did not join Ray at {cluster.address} within cluster.startup_deadline_seconds ({deadline_seconds:g})"
            )
        time.sleep(0.1)


def _alive_nodes() -> dict[str, dict[str, float]]:
    """Address -> resources."""
    return {node["NodeManagerAddress"]: node["Resources"] for node in ray.nodes() if node["Alive"]}


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
    group, bundles = _place(config, num_ranks, 0 if attached else num_engines, cluster)

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
                experts=ExpertShape.of(read_hf_config(config.model.path)) if settings.return_routed_experts else None,
            )
            yield RayBackend(handle, (router,), places)
    finally:
        for process in (*actor, *(engines or ()), *(servers.processes if servers else ())):
            ray.kill(process.handle)
        ray.util.remove_placement_group(group)


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


def _whereabouts() -> tuple[int, str]:
    """This process, and the address of its node."""
    return os.getpid(), ray.util.get_node_ip_address()


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
                init_method = await _call(ranks[0], ranks[0].handle.rendezvous.remote())
            started, endpoints = await asyncio.gather(call_all(ranks, "start", init_method, frozen), engines)
            return started, endpoints
    except TimeoutError:
        raise EngineError(
            f"ranks and engines did not come up within cluster.startup_deadline_seconds ({deadline:.0f}); see {logs}"
        ) from None
    finally:
        engines.cancel()


async def _start_servers(bundles: _Bundles, ranks: Sequence[Process], servers: RayServers) -> list[EngineEndpoint]:
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

    return partial(AutoTokenizer.from_pretrained(config.model.path).batch_decode, skip_special_tokens=True)


async def call_all(processes: Sequence[Process], method: str, *args: Any) -> list[Any]:
    """Call a method on all processes at once; results in their order. Fails with the process that died, else the first error."""
    return await call_each(processes, method, [args] * len(processes))


async def call_each(processes: Sequence[Process], method: str, args_of_each: Sequence[tuple[Any, ...]]) -> list[Any]:
    """`call_all` with arguments of its own for each process."""
    tasks = [
        asyncio.ensure_future(_call(process, getattr(process.handle, method).remote(*args)))
        for process, args in zip(processes, args_of_each, strict=True)
    ]
    return await _first_failure(tasks)


async def _first_failure(tasks: Sequence[asyncio.Future]) -> list[Any]:
    if not tasks:
        return []
    try:
        done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        if any(task.exception() for task in done):
            late, _ = await asyncio.wait(pending, timeout=GRACE_SECONDS) if pending else (set(), set())
            errors = [error for task in (*done, *late) if (error := task.exception())]
            raise next((error for error in errors if isinstance(error, WorkerDiedError)), errors[0])
        return [task.result() for task in tasks]
    finally:
        for task in tasks:
            task.cancel()


async def _call(process: Process, reference: Any) -> Any:
    try:
        return await reference
    except RayError as error:
        raise _in_words(process, error) from error


async def _exhaust(process: Process, stream: Any) -> None:
    try:
        async for reference in stream:
            await reference
    except RayError as error:
        raise _in_words(process, error) from error


def _in_words(process: Process, error: RayError) -> Exception:
    """Our own errors as they were raised; a death by name; anything else with the process it came from."""
    if isinstance(error, RayTaskError):
        cause = error.cause
        if isinstance(cause, DapoMegatronError):
            return cause
        if isinstance(cause, AssertionError):  # not a death: it would come again
            return AssertionError(str(process.died(f"{type(cause).__name__}: {cause}")))
        return process.died(f"{type(cause).__name__}: {cause}")
    if isinstance(error, ActorDiedError | ActorUnavailableError):
        return process.died("its process ended")
    return process.died(error)


@dataclass(frozen=True, slots=True)
class _Bundles:
    """Which placement bundle a process takes and which share of it."""

    num_ranks: int
    share: float
    gpu: bool
    split: bool
    gpus_per_engine: int

    def of_rank(self, rank: int) -> dict[str, Any]:
        return self._options(rank, 1)

    def of_engine(self, index: int) -> dict[str, Any]:
        if self.split:
            return self._options(self.num_ranks + index, self.gpus_per_engine)
        return self._options(self.first_rank_of(index), 1)

    def first_rank_of(self, index: int) -> int:
        """Colocated: the rank whose bundle the engine shares; its other GPUs are those of the ranks that follow."""
        return index * self.gpus_per_engine % self.num_ranks

    def _options(self, bundle: int, num_gpus: int) -> dict[str, Any]:
        return {"index": bundle, "num_cpus": self.share, "num_gpus": self.share * num_gpus if self.gpu else 0}


def _place(config: Config, ranks: int, engines: int, cluster: RayCluster | None) -> tuple[PlacementGroup, _Bundles]:
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
    return group, _Bundles(ranks, 1.0 / most_on_a_bundle, gpu, split, size)


def _addresses(
    config: Config, ranks: int, engines: int, engine_size: int, cluster: RayCluster | None, *, gpu: bool
) -> list[str | None]:
    """The node of each rank, then of each engine with a bundle of its own; None on one machine."""
    alive = _alive_nodes()
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


def _start(cls: type, name: str, log_file: Path, group: PlacementGroup, place: dict[str, Any], *args: Any) -> Process:
    options = {
        "num_cpus": place["num_cpus"],
        "num_gpus": place["num_gpus"],
        "scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=place["index"]),
        "max_restarts": 0,
    }
    return Process(name, ray.remote(cls).options(**options).remote(*args, log_file.absolute()), log_file)


def _settle_in(log_file: Path) -> None:
    _write_output_to(log_file)
    let_be_inspected()


def _write_output_to(log_file: Path) -> None:
    """Send this process's standard output and error, those of C libraries included, to a file."""
    log_file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s", force=True)
    logging.getLogger("megatron").setLevel(logging.WARNING)  # its settings fill the lines quoted when a rank dies
