"""Broadcasts to servers anywhere: one process group for each server, the sender is its rank 0."""

from __future__ import annotations

import socket
import uuid
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor

from dapo_megatron.types import EngineEndpoint, EngineError
from dapo_megatron.weights.transports.channel import StagedBucket
from dapo_megatron.weights.transports.server import WeightServer


class DistributedChannel:
    """See `channel.Channel`. Its group outlives the version: keep the channel as long as the server lives."""

    def __init__(self, server: WeightServer, timeout_seconds: float):
        self._server = server
        self._timeout = timedelta(seconds=timeout_seconds)
        self._group: _Group | None = None

    @property
    def endpoint(self) -> EngineEndpoint:
        return self._server.endpoint

    def open(self) -> None:
        self._group = self._group or _Group.meet(self._server, self._timeout)
        self._server.begin()

    def send(self, bucket: StagedBucket) -> None:
        if self._group is None:
            raise EngineError(f"{self.endpoint.name} has no process group; open the channel before buckets are sent")
        try:
            broadcast = self._group.broadcast(bucket.payload)
            self._server.update_from_group(self._group.name, bucket.entries, bucket.version_if_last)
            broadcast.wait()
        except RuntimeError as error:  # torch's collectives have no error of their own
            raise EngineError(f"{self.endpoint.name} was lost in the broadcast of bucket {bucket.index}: {error}") from error

    def close(self) -> None:
        self._server.end()

    def abandon(self) -> None:
        """The group is left: a broadcast may be stuck in it. The next version makes another."""
        self._group = None


class DistributedChannels:
    """One for each server; one that has been started again (another endpoint of the same name) gets another."""

    def __init__(self, timeout_seconds: float):
        self._timeout_seconds = timeout_seconds
        self._channels: dict[str, DistributedChannel] = {}

    def of(self, server: WeightServer) -> DistributedChannel:
        """The channel to the server, with the group that it had at the version before."""
        name = server.endpoint.name
        if name not in self._channels or self._channels[name].endpoint != server.endpoint:
            self._channels[name] = DistributedChannel(server, self._timeout_seconds)
        return self._channels[name]


class _Group:
    """A process group with the ranks of one engine."""

    def __init__(self, name: str, group: Any, store: dist.TCPStore, device: torch.device):
        self.name, self._group, self._store, self._device = name, group, store, device

    @classmethod
    def meet(cls, server: WeightServer, timeout: timedelta) -> _Group:
        """Make the group. EngineError when the engine's ranks do not come."""
        name = f"weights_{uuid.uuid4().hex[:12]}"
        on_gpu = server.endpoint.device == "cuda"
        host = _own_address(server.endpoint)
        world_size = 1 + server.endpoint.tensor_parallel_size
        pool = ThreadPoolExecutor(1)
        try:
            tcp = dist.TCPStore(host, 0, world_size, is_master=True, timeout=timeout, wait_for_workers=False)
            # SGLang 0.5.23 makes its side with torch's own helper, which looks for its peers under these three prefixes.
            store = dist.PrefixStore("cuda/" if on_gpu else "cpu/", dist.PrefixStore(f"{name}/", dist.PrefixStore(name, tcp)))
            made: Future[Any] = pool.submit(_make, on_gpu, store, world_size, timeout)
            server.join_group(name, host, tcp.port, "nccl" if on_gpu else "gloo")
            group = made.result()
        except (RuntimeError, dist.DistError) as error:
            raise EngineError(
                f"{server.endpoint.name} did not meet the actor at {host}: {error}; both must reach each other on any port"
            ) from error
        finally:
            pool.shutdown(wait=False)  # an engine that refuses leaves our side waiting until the timeout
        return cls(name, group, tcp, torch.device("cuda") if on_gpu else torch.device("cpu"))

    def broadcast(self, payload: Tensor) -> dist.Work:
        """Begin to send; `wait` on what it returns."""
        work: dist.Work = self._group.broadcast(payload.to(self._device), 0)
        return work


def _make(on_gpu: bool, store: dist.Store, world_size: int, timeout: timedelta) -> Any:
    """Returns when all ranks have met."""
    if on_gpu:
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return dist.ProcessGroupNCCL(store, 0, world_size, options)
    return dist.ProcessGroupGloo(store, 0, world_size, timeout)


def _own_address(endpoint: EngineEndpoint) -> str:
    """The address of this machine on the way to the server."""
    address = urlsplit(endpoint.url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address.hostname, address.port or 443))
        host: str = probe.getsockname()[0]
        return host
