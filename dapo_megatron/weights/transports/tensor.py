"""Memory that servers on the sender's node can map: a request says where it is, the engine's ranks copy out of it.

Host memory goes by its name, memory of the sender's GPU by a CUDA IPC handle, which an engine can open that sees this GPU.
"""

from __future__ import annotations

import base64
import io
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace
from typing import Any

import torch
import torch.multiprocessing
from torch import Tensor
from torch.multiprocessing import reductions

from dapo_megatron.types import EngineEndpoint
from dapo_megatron.weights.transports.channel import StagedBucket
from dapo_megatron.weights.transports.server import WeightServer

_BY_NAME = "file_system"
"""torch's sharing strategy in which another process finds the memory by its name; descriptors pass only between relatives."""
_DEVICE_ARGUMENT = 6
"""Of `rebuild_cuda_tensor`, torch 2.14.1."""


def shared_memory(num_bytes: int) -> Tensor:
    """uint8 memory that servers on this node can map; it goes when the tensor goes.

    This process shares tensors by name from now on: torch looks at the strategy again whenever a tensor is pickled.
    """
    torch.multiprocessing.set_sharing_strategy(_BY_NAME)
    return torch.empty(num_bytes, dtype=torch.uint8).share_memory_()


class TensorChannel:
    """See `channel.Channel`. The payload of its buckets is a slice of `shared_memory`."""

    def __init__(self, server: WeightServer):
        self._server = server

    @property
    def endpoint(self) -> EngineEndpoint:
        return self._server.endpoint

    def open(self) -> None:
        self._server.begin()

    def send(self, bucket: StagedBucket) -> None:
        if bucket.payload.is_cuda:
            torch.cuda.synchronize(bucket.payload.device)  # other processes know nothing of our streams
        # Pickled once for each rank: torch counts the readers that a piece of shared memory still expects.
        payloads = [pickled(bucket) for _ in range(self.endpoint.tensor_parallel_size)]
        self._server.update_from_tensor(payloads, bucket.version_if_last)

    def close(self) -> None:
        self._server.end()

    def abandon(self) -> None:
        """The server keeps the update open; the next version ends it first."""


class _OnGpu:
    """A tensor by its CUDA IPC handle. The GPU goes by its UUID, as SGLang 0.5.23 takes it: processes count GPUs differently."""

    def __init__(self, tensor: Tensor):
        self._tensor = tensor

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        rebuild, arguments = reductions.reduce_tensor(self._tensor)
        index = arguments[_DEVICE_ARGUMENT]
        uuid = str(torch.cuda.get_device_properties(index).uuid)
        return rebuild, (*arguments[:_DEVICE_ARGUMENT], uuid, *arguments[_DEVICE_ARGUMENT + 1 :])


def pickled(bucket: StagedBucket) -> str:
    """The `flattened_bucket` of SGLang 0.5.23, as its restricted unpickler reads it: a tensor by reference and records beside it."""
    records = [
        SimpleNamespace(
            name=entry.name,
            shape=torch.Size(entry.shape),
            dtype=getattr(torch, entry.dtype),
            start_idx=entry.start,
            end_idx=entry.stop,
            numel=entry.num_bytes,
        )
        for entry in bucket.entries
    ]
    buffer = io.BytesIO()
    payload = _OnGpu(bucket.payload) if bucket.payload.is_cuda else bucket.payload
    ForkingPickler(buffer, 4).dump({"flattened_tensor": payload, "metadata": records})
    return base64.b64encode(buffer.getvalue()).decode()
