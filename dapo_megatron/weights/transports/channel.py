"""What the transports have in common: the bucket as it lies in host memory, and the way of one version to one server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from dapo_megatron.types import EngineEndpoint
from dapo_megatron.weights.sync import BucketPlan


@dataclass(frozen=True, slots=True, eq=False)
class StagedBucket:
    """Whole HF tensors of one dtype, one after the other, in uint8 host memory that is used again when all channels are done."""

    version: int
    index: int
    """From 0."""
    is_last: bool
    dtype: str
    """By its torch name."""
    plan: BucketPlan
    shapes: Mapping[str, tuple[int, ...]]
    """HF name -> shape, in the order of the payload."""
    payload: Tensor

    @property
    def version_if_last(self) -> int | None:
        """What the last message of the version says."""
        return self.version if self.is_last else None

    def tensors(self) -> dict[str, Tensor]:
        """Views of the payload by HF name."""
        import torch

        dtype = getattr(torch, self.dtype)
        return {
            piece.name: self.payload[piece.byte_offset : piece.byte_offset + piece.num_bytes]
            .view(dtype)
            .view(self.shapes[piece.name])
            for piece in self.plan.pieces
        }


class Channel(Protocol):
    """One server. Calls come one at a time: `open`, `send` for each bucket, `close`; an EngineError or OSError ends the version."""

    @property
    def endpoint(self) -> EngineEndpoint: ...

    def open(self) -> None:
        """Begin a version."""

    def send(self, bucket: StagedBucket) -> None:
        """Returns when the server needs the payload no more."""

    def close(self) -> None:
        """End the version: the server holds all of it."""

    def abandon(self) -> None:
        """Give up after an error; never raises one of its own."""
