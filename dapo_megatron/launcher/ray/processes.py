"""What runs in the processes of a run: one class per kind. Each process writes its output to a file of its own in RUN/logs."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import ray

from dapo_megatron.actor.probed import Probed
from dapo_megatron.actor.replayed import Replay
from dapo_megatron.config.schema import Config, HfEngineConfig
from dapo_megatron.launcher.imports import without_collection
from dapo_megatron.launcher.rank import build_rank
from dapo_megatron.launcher.server_process import ServerProcess
from dapo_megatron.launcher.slurm.network import interface_of
from dapo_megatron.launcher.stall import let_be_inspected
from dapo_megatron.rollout.engine import GenerateRequest, GenerateResult
from dapo_megatron.rollout.sglang_server import free_port
from dapo_megatron.types import EngineEndpoint, TrainBatch
from dapo_megatron.weights.file_digest import FileDigest
from dapo_megatron.weights.sync import WeightBucket, WeightManifest
from dapo_megatron.weights.transports.records import PushReport


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


def _whereabouts() -> tuple[int, str]:
    """This process, and the address of its node."""
    return os.getpid(), ray.util.get_node_ip_address()


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
