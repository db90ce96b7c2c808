"""Sends versions of the weights to rollout servers, in the protocol of `weights/transports/__init__.py`."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from dapo_megatron.actor.live_weights import LiveBox
from dapo_megatron.actor.weight_sender import ASSEMBLER, WeightSender
from dapo_megatron.config.schema import Config
from dapo_megatron.types import EngineEndpoint, EngineError, FingerprintError
from dapo_megatron.weights.engine_layout import engine_layout
from dapo_megatron.weights.held_hashes import HeldHashes, differences
from dapo_megatron.weights.plan import ModelMapping
from dapo_megatron.weights.transports.channel import Channel, StagedBucket
from dapo_megatron.weights.transports.disk import DiskChannel, VersionFolder
from dapo_megatron.weights.transports.distributed import DistributedChannel
from dapo_megatron.weights.transports.fan_out import FanOut
from dapo_megatron.weights.transports.records import PushReport, PushRules, Transport
from dapo_megatron.weights.transports.server import WeightServer
from dapo_megatron.weights.transports.tensor import TensorChannel, shared_memory

LOOPBACK = "127.0.0.1"
_MEMCPY_BYTES = 64 * 2**20
_NUM_MEMCPY_RUNS = 3


type _Kind = tuple[int, Literal["cpu", "cuda"]]
"""tensor_parallel_size and device of a server; servers of one kind report the same hashes."""


class WeightPusher:
    """One per rank, collective. Extra memory on the assembler: two buckets; on the others a bucket's own part."""

    def __init__(self, mapping: ModelMapping, hf_config: Mapping[str, Any], live: Sequence[LiveBox], rules: PushRules):
        self._mapping, self._hf_config, self._rules = mapping, hf_config, rules
        self._sender = WeightSender(mapping, live, rules.bucket_bytes, whole_tensors=True, dtype=getattr(torch, rules.dtype))
        self._buffers: tuple[Tensor, ...] = (torch.empty(0), torch.empty(0))
        self._groups: dict[EngineEndpoint, DistributedChannel] = {}
        if dist.get_rank() == ASSEMBLER:
            self._buffers = tuple(shared_memory(self._sender.plan.largest_bucket_bytes) for _ in self._buffers)
            self._bytes_per_second = _memcpy_bytes_per_second()

    def push(self, version: int, targets: Mapping[EngineEndpoint, Transport]) -> PushReport | None:
        """Bring the present weights to the servers; None on ranks that are not the assembler.

        A server that dies or refuses is a failure in the report; the others get the version. FingerprintError when a server that got
        it holds something else.
        """
        if dist.get_rank() != ASSEMBLER:
            for plan in self._sender.plan.buckets:
                self._sender.gather(plan, self._buffers[0])
            return None
        start = time.perf_counter()
        folder = VersionFolder(self._directory(), version) if "disk" in targets.values() else None
        hashes = self._hashes(targets) if self._rules.check_hashes else {}
        with ThreadPoolExecutor(len(targets) + 1) as pool:
            channels = [self._channel(endpoint, transport, version, folder) for endpoint, transport in targets.items()]
            fan_out = FanOut(channels, list(hashes.values()), pool)
            self._send(fan_out, version)
            sent = time.perf_counter()
            wrong = self._check(fan_out, hashes, pool) if hashes else []
        if folder:
            folder.remove()
        if wrong:
            raise FingerprintError(
                f"weights of version {version} are not what the engines hold; do not generate with them: {'; '.join(wrong)}"
            )
        now, num_bytes = time.perf_counter(), sum(plan.num_bytes for plan in self._sender.plan.buckets)
        return PushReport(version, num_bytes, now - start, now - sent, num_bytes / self._bytes_per_second, dict(fan_out.failures))

    def _send(self, fan_out: FanOut, version: int) -> None:
        fan_out.open()
        plans = self._sender.plan.buckets
        for index, plan in enumerate(plans):
            payload = self._buffers[index % 2][: plan.num_bytes]
            self._sender.gather(plan, payload)
            fan_out.wait()
            shapes = {piece.name: self._mapping.hf_tensors[piece.name] for piece in plan.pieces}
            is_last = index + 1 == len(plans)
            fan_out.start(StagedBucket(version, index, is_last, self._sender.wire_dtype, plan, shapes, payload))
        fan_out.close()

    def _hashes(self, targets: Iterable[EngineEndpoint]) -> dict[_Kind, HeldHashes]:
        itemsize = getattr(torch, self._rules.dtype).itemsize
        return {
            kind: HeldHashes(engine_layout(self._mapping, self._hf_config, *kind), kind[1], itemsize)
            for kind in sorted({_kind(endpoint) for endpoint in targets})
        }

    def _check(self, fan_out: FanOut, hashes: Mapping[_Kind, HeldHashes], pool: ThreadPoolExecutor) -> list[str]:
        """Sentences about servers that hold something else. One that cannot be asked any more is a failure."""
        expected = {kind: of_kind.finish() for kind, of_kind in hashes.items()}
        asked = {channel.endpoint: pool.submit(self._server(channel.endpoint).hashes) for channel in fan_out.alive}
        wrong = []
        for endpoint, future in asked.items():
            try:
                sentences = differences(expected[_kind(endpoint)], future.result())
            except EngineError as error:
                fan_out.failures[endpoint.name] = str(error)
                continue
            wrong += [f"{endpoint.name}: {sentence}" for sentence in sentences]
        return wrong

    def _channel(self, endpoint: EngineEndpoint, transport: Transport, version: int, folder: VersionFolder | None) -> Channel:
        server = self._server(endpoint)
        if folder and transport == "disk":
            return DiskChannel(server, folder, version)
        if transport == "tensor":
            return TensorChannel(server)
        if endpoint not in self._groups:
            self._groups[endpoint] = DistributedChannel(server, self._rules.timeout_seconds)
        return self._groups[endpoint]

    def _server(self, endpoint: EngineEndpoint) -> WeightServer:
        return WeightServer(endpoint, self._rules.timeout_seconds, self._rules.model_timeout_seconds)

    def _directory(self) -> Path:
        if self._rules.directory is None:
            raise EngineError(
                "transport disk needs a folder that the actor and the engines see; set rollout.engine.weight_sync_dir"
            )
        return self._rules.directory


def _kind(endpoint: EngineEndpoint) -> _Kind:
    return endpoint.tensor_parallel_size, endpoint.device


def configured_pusher(config: Config, mapping: ModelMapping, live: Sequence[LiveBox]) -> WeightPusher:
    """The pusher of a run whose engines are servers; collective."""
    engine = config.rollout.engine
    if engine.type != "sglang":
        raise EngineError(f"weights are pushed to servers, rollout.engine.type ({engine.type}) is none; set it to sglang")
    rules = PushRules(
        bucket_bytes=config.rollout.weight_bucket_mib * 2**20,
        dtype="float32" if engine.dtype == "fp32" else "bfloat16",
        directory=engine.weight_sync_dir,
        timeout_seconds=engine.health_deadline_seconds,
        model_timeout_seconds=config.cluster.unlearnt_deadline_seconds,
    )
    return WeightPusher(mapping, json.loads((config.model.path / "config.json").read_text()), live, rules)


def transports(config: Config, endpoints: Sequence[EngineEndpoint], node: str) -> dict[EngineEndpoint, Transport]:
    """How each server is reached from `node`, the address of the assembler's machine."""
    engine = config.rollout.engine
    configured = engine.weight_transport if engine.type == "sglang" else "auto"
    if configured != "auto":
        return dict.fromkeys(endpoints, configured)
    return {endpoint: "tensor" if endpoint.node in (node, LOOPBACK) else "distributed" for endpoint in endpoints}


def _memcpy_bytes_per_second() -> float:
    """Host memory to host memory, the best of some runs."""
    source, target = torch.ones(_MEMCPY_BYTES, dtype=torch.uint8), torch.zeros(_MEMCPY_BYTES, dtype=torch.uint8)
    times = []
    for _ in range(_NUM_MEMCPY_RUNS):
        start = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - start)
    return _MEMCPY_BYTES / min(times)
