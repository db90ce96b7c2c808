"""What the transports have in common: the bucket as it lies in memory, and the way of one version to one server."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from dapo_megatron.types import EngineEndpoint
from dapo_megatron.weights.codecs import Fp8Codec, dequantise, quantise, scale_name, scale_shape
from dapo_megatron.weights.sync import WIRE_ITEMSIZE

if TYPE_CHECKING:
    from torch import Tensor

_FP8 = "float8_e4m3fn"
_ITEMSIZE = WIRE_ITEMSIZE | {_FP8: 1}


@dataclass(frozen=True, slots=True)
class StagedTensor:
    """A whole HF tensor, or the scales of one, row-major from byte `start` of a payload."""

    name: str
    dtype: str
    """By its torch name."""
    shape: tuple[int, ...]
    start: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * _ITEMSIZE[self.dtype]

    @property
    def stop(self) -> int:
        """The byte behind it."""
        return self.start + self.num_bytes

    def of(self, payload: Tensor) -> Tensor:
        """The view of it."""
        import torch

        return payload[self.start : self.stop].view(getattr(torch, self.dtype)).view(self.shape)


@dataclass(frozen=True, slots=True, eq=False)
class StagedBucket:
    """Whole tensors, one right behind the other, in uint8 memory that may be used again when all channels are done."""

    version: int
    index: int
    """From 0."""
    is_last: bool
    entries: tuple[StagedTensor, ...]
    payload: Tensor
    """On the host, or on the sender's GPU (`WeightPusher`)."""
    codec: Fp8Codec | None = None

    @property
    def version_if_last(self) -> int | None:
        """What the last message of the version says."""
        return self.version if self.is_last else None

    def tensors(self) -> dict[str, Tensor]:
        """Views of the payload by name."""
        return {entry.name: entry.of(self.payload) for entry in self.entries}

    def reported(self) -> Iterator[tuple[str, Tensor]]:
        """HF name and tensor as a server hashes it: quantised weights are multiplied with their scales, which it does not report."""
        tensors = self.tensors()
        quantised = self.codec.names if self.codec else frozenset()
        scales = {scale_name(name) for name in quantised}
        for name, tensor in tensors.items():
            if name in quantised:
                assert self.codec is not None
                whole = tuple(slice(0, size) for size in tensor.shape)
                yield name, dequantise(tensor, tensors[scale_name(name)], whole, self.codec.block)
            elif name not in scales:
                yield name, tensor


def plain_entries(tensors: Sequence[tuple[str, tuple[int, ...]]], dtype: str) -> tuple[StagedTensor, ...]:
    """The tensors in their order, all of one dtype."""
    return _one_behind_the_other([(name, dtype, shape) for name, shape in tensors])


def quantised_entries(plain: Sequence[StagedTensor], codec: Fp8Codec) -> tuple[StagedTensor, ...]:
    """What the codec makes of `plain`: scales, then what is not quantised, then weights, so that each is aligned to its own dtype.

    Each kind keeps the order, in which hashes want the parts of a tensor.
    """
    weights = [entry for entry in plain if entry.name in codec.names]
    return _one_behind_the_other(
        [
            *((scale_name(entry.name), "float32", scale_shape(entry.shape, codec.block)) for entry in weights),
            *((entry.name, entry.dtype, entry.shape) for entry in plain if entry.name not in codec.names),
            *((entry.name, _FP8, entry.shape) for entry in weights),
        ]
    )


def encode(
    plain: Sequence[StagedTensor], gathered: Tensor, entries: Sequence[StagedTensor], payload: Tensor, codec: Fp8Codec
) -> None:
    """Write `entries` (`quantised_entries(plain, codec)`) of what lies in `gathered` as `plain`; both uint8, of any devices."""
    targets = {entry.name: entry.of(payload) for entry in entries}
    for entry in plain:
        tensor = entry.of(gathered)
        if entry.name in codec.names:
            weight, scales = quantise(tensor, codec.block, powers_of_two=codec.powers_of_two)
            targets[entry.name].copy_(weight)
            targets[scale_name(entry.name)].copy_(scales)
        else:
            targets[entry.name].copy_(tensor)


def _one_behind_the_other(tensors: Sequence[tuple[str, str, tuple[int, ...]]]) -> tuple[StagedTensor, ...]:
    entries: list[StagedTensor] = []
    start = 0
    for name, dtype, shape in tensors:
        entries.append(StagedTensor(name, dtype, shape, start))
        start = entries[-1].stop
    return tuple(entries)


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
