"""Sends versions of the weights to rollout servers, in the protocol of `weights/transports/__init__.py`."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from dapo_megatron.actor.live_weights import LiveBox
from dapo_megatron.actor.weight_sender import ASSEMBLER, WeightSender
from dapo_megatron.config.schema import Config
from dapo_megatron.types import EngineEndpoint, EngineError, FingerprintError
from dapo_megatron.weights.codecs import Fp8Codec, fp8_codec
from dapo_megatron.weights.engine_layout import engine_layout
from dapo_megatron.weights.held_hashes import HeldHashes, differences
from dapo_megatron.weights.hf_files import HfFiles
from dapo_megatron.weights.plan import ModelMapping
from dapo_megatron.weights.sync import WIRE_ITEMSIZE, BucketPlan
from dapo_megatron.weights.transports.channel import (
    Channel,
    StagedBucket,
    StagedTensor,
    encode,
    plain_entries,
    quantised_entries,
)
from dapo_megatron.weights.transports.disk import DiskChannel, VersionFolder
from dapo_megatron.weights.transports.distributed import DistributedChannels
from dapo_megatron.weights.transports.fan_out import FanOut
from dapo_megatron.weights.transports.records import PushReport, PushRules, Transport, reads_gpu
from dapo_megatron.weights.transports.server import WeightServer
from dapo_megatron.weights.transports.tensor import TensorChannel, shared_memory

LOOPBACK = "127.0.0.1"
SLOWEST_BYTES_PER_SECOND = 20e6
"""A server that loads or hashes a model slower than this is taken for hung."""
_MEMCPY_BYTES = 64 * 2**20
_NUM_MEMCPY_RUNS = 3


type _Kind = tuple[int, Literal["cpu", "cuda"]]
"""tensor_parallel_size and device of a server; servers of one kind report the same hashes."""


class WeightPusher:
    """One per rank, collective.

    Extra memory on the assembler: two buckets and, with a codec, one more on its device; on the others a bucket's own part.
    """

    def __init__(
        self,
        mapping: ModelMapping,
        hf_config: Mapping[str, Any],
        live: Sequence[LiveBox],
        rules: PushRules,
        codec: Fp8Codec | None = None,
    ):
        """`codec`: how the servers want weights that are quantised."""
        self._mapping, self._hf_config, self._rules, self._codec = mapping, hf_config, rules, codec
        self._sender = WeightSender(
            mapping,
            live,
            rules.bucket_bytes,
            whole_tensors=True,
            dtype=getattr(torch, rules.dtype),
            check_shards=rules.check_shards,
            compare_copies=rules.compare_copies,
        )
        self._device = live[0].data.device
        self._buckets = [self._layout(plan) for plan in self._sender.plan.buckets]
        self._host_buffers: tuple[Tensor, ...] = ()
        self._groups = DistributedChannels(rules.timeout_seconds)
        if dist.get_rank() == ASSEMBLER:
            self._bytes_per_second = _memcpy_bytes_per_second()

    def push(self, version: int, targets: Mapping[EngineEndpoint, Transport], gpu_id: int | None = None) -> PushReport | None:
        """Bring the present weights to the servers; None on ranks that are not the assembler.

        `gpu_id` is the assembler's GPU, as `EngineEndpoint.gpu_ids` counts them. A server that dies or refuses is a failure in the
        report; the others get the version. FingerprintError when the ranks hold something else than was gathered, before a server is told
        the version's number, and when a server that got it holds something else.
        """
        if self._sender.check:
            self._sender.check.begin(version)
        if dist.get_rank() != ASSEMBLER:
            for plan in self._sender.plan.buckets:
                self._sender.gather(plan, torch.empty(0))
            if self._sender.check:
                self._sender.check.finish()
            return None
        start = time.perf_counter()
        folder = VersionFolder(self._directory(), version) if "disk" in targets.values() else None
        hashes = self._hashes(targets) if self._rules.check_hashes else {}
        try:
            with ThreadPoolExecutor(len(targets) + 1) as pool:
                channels = [self._channel(endpoint, transport, version, folder) for endpoint, transport in targets.items()]
                fan_out = FanOut(channels, list(hashes.values()), pool)
                on_device = self._device.type == "cuda" and all(reads_gpu(*target, gpu_id) for target in targets.items())
                self._send(fan_out, version, on_device=on_device)
                sent = time.perf_counter()
                wrong = self._check(fan_out, hashes, pool) if hashes else []
        finally:
            self._host_buffers = ()  # shared memory has a name, which a rank that Ray kills would leave behind
            if folder:
                folder.remove()
        if wrong:
            raise FingerprintError(
                f"weights of version {version} are not what the engines hold; do not generate with them: {'; '.join(wrong)}"
            )
        now, num_bytes = time.perf_counter(), sum(bucket.sent[-1].stop for bucket in self._buckets)
        return PushReport(
            version,
            num_bytes,
            seconds=now - start,
            check_seconds=now - sent,
            memcpy_seconds=num_bytes / self._bytes_per_second,
            failures=dict(fan_out.failures),
            shard_check_seconds=self._sender.check.seconds if self._sender.check else 0.0,
        )

    def _send(self, fan_out: FanOut, version: int, *, on_device: bool) -> None:
        fan_out.open()
        for index, bucket in enumerate(self._buckets):
            payload = self._payload(index, on_device=on_device)
            is_last = index + 1 == len(self._buckets)
            if self._codec is None:
                self._gather(bucket.plan, payload, is_last=is_last)
            else:
                gathered = torch.empty(bucket.plan.num_bytes, dtype=torch.uint8, device=self._device)
                self._gather(bucket.plan, gathered, is_last=is_last)
                encode(bucket.gathered, gathered, bucket.sent, payload, self._codec)
            fan_out.wait()
            fan_out.start(StagedBucket(version, index, is_last, bucket.sent, payload, self._codec))
        fan_out.close()
        if on_device:
            torch.cuda.ipc_collect()

    def _gather(self, plan: BucketPlan, payload: Tensor, *, is_last: bool) -> None:
        self._sender.gather(plan, payload)
        if self._sender.check:
            self._sender.check.add(plan.pieces, payload)
            if is_last:  # which goes out with the version's number
                self._sender.check.finish()

    def _layout(self, plan: BucketPlan) -> _Bucket:
        names = [(piece.name, self._mapping.hf_tensors[piece.name]) for piece in plan.pieces]
        gathered = plain_entries(names, plan.dtype)
        return _Bucket(plan, gathered, quantised_entries(gathered, self._codec) if self._codec else gathered)

    def _payload(self, index: int, *, on_device: bool) -> Tensor:
        """Memory for a bucket. On the GPU it is new each time: torch lets memory be shared once; on the host there are two, in turns."""
        num_bytes = self._buckets[index].sent[-1].stop
        if on_device:
            return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        if not self._host_buffers:
            largest = max(bucket.sent[-1].stop for bucket in self._buckets)
            self._host_buffers = (shared_memory(largest), shared_memory(largest))
        return self._host_buffers[index % 2][:num_bytes]

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
        return self._groups.of(server)

    def _server(self, endpoint: EngineEndpoint) -> WeightServer:
        return WeightServer(endpoint, self._rules.timeout_seconds, self._rules.model_timeout_seconds)

    def _directory(self) -> Path:
        if self._rules.directory is None:
            raise EngineError(
                "transport disk needs a folder that the actor and the engines see; set rollout.engine.weight_sync_dir"
            )
        return self._rules.directory


@dataclass(frozen=True, slots=True)
class _Bucket:
    """What a bucket holds as the ranks give it, and as it is sent."""

    plan: BucketPlan
    gathered: tuple[StagedTensor, ...]
    sent: tuple[StagedTensor, ...]


def _kind(endpoint: EngineEndpoint) -> _Kind:
    return endpoint.tensor_parallel_size, endpoint.device


def configured_pusher(config: Config, mapping: ModelMapping, live: Sequence[LiveBox]) -> WeightPusher:
    """The pusher of a run whose engines are servers; collective."""
    engine = config.rollout.engine
    if engine.type != "sglang":
        raise EngineError(f"weights are pushed to servers, rollout.engine.type ({engine.type}) is none; set it to sglang")
    dtype: Literal["float32", "bfloat16"] = "float32" if engine.dtype == "fp32" else "bfloat16"
    num_bytes = sum(math.prod(shape) for shape in mapping.hf_tensors.values()) * WIRE_ITEMSIZE[dtype]
    rules = PushRules(
        bucket_bytes=config.rollout.weight_bucket_mib * 2**20,
        compare_copies=config.rollout.compare_weight_copies,
        dtype=dtype,
        directory=_directory_of_run(config, engine.weight_sync_dir),
        timeout_seconds=engine.health_deadline_seconds,
        model_timeout_seconds=min(
            engine.health_deadline_seconds + num_bytes / SLOWEST_BYTES_PER_SECOND, config.cluster.unlearnt_deadline_seconds
        ),
    )
    hf_config = json.loads((config.model.path / "config.json").read_text())
    codec = fp8_codec(hf_config, HfFiles(config.model.path).tensors)
    return WeightPusher(mapping, hf_config, live, rules, codec)


def _directory_of_run(config: Config, directory: Path | None) -> Path | None:
    """Runs may share the folder; a run that goes on finds what it has left there."""
    run = config.run.dir.absolute()
    return directory / f"{run.name}_{xxhash.xxh3_64_hexdigest(str(run).encode())[:8]}" if directory is not None else None


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
