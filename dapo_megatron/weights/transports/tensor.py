"""Shared memory to servers on the sender's node: a request carries the memory's name, the engine's ranks copy out of it."""

from __future__ import annotations

import base64
import io
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace

import torch
import torch.multiprocessing
from torch import Tensor

from dapo_megatron.types import EngineEndpoint
from dapo_megatron.weights.transports.channel import StagedBucket
from dapo_megatron.weights.transports.server import WeightServer

_BY_NAME = "file_system"
"""torch's sharing strategy in which another process finds the memory by its name; descriptors pass only between relatives."""


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
        # Pickled once for each rank: torch counts the readers that a piece of shared memory still expects.
        payloads = [_pickled(bucket) for _ in range(self.endpoint.tensor_parallel_size)]
        self._server.update_from_tensor(payloads, bucket.version_if_last)

    def close(self) -> None:
        self._server.end()

    def abandon(self) -> None:
        """The server keeps the update open; the next version ends it first."""


def _pickled(bucket: StagedBucket) -> str:
    """The `flattened_bucket` of SGLang 0.5.23, as its restricted unpickler reads it: a tensor by reference and records beside it."""
    dtype = getattr(torch, bucket.dtype)
    records = [
        SimpleNamespace(
            name=piece.name,
            shape=torch.Size(bucket.shapes[piece.name]),
            dtype=dtype,
            start_idx=piece.byte_offset,
            end_idx=piece.byte_offset + piece.num_bytes,
            numel=piece.num_bytes,
        )
        for piece in bucket.plan.pieces
    ]
    buffer = io.BytesIO()
    ForkingPickler(buffer, 4).dump({"flattened_tensor": bucket.payload, "metadata": records})
    return base64.b64encode(buffer.getvalue()).decode()
