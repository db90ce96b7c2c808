"""Hashes of what each rank of an engine must hold, made by the sender while the tensors pass by.

A server reports 64 bits for each of its tensors: of the SHA-256 of its bytes where the engine runs on a CPU, else of a hash that
GPUs are quick at (`word_hash.py`).
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from dapo_megatron.types import FingerprintError
from dapo_megatron.weights.engine_layout import EngineTensor
from dapo_megatron.weights.word_hash import WordHash

_NUM_HEX_DIGITS = 16
_NUM_SHOWN = 3


class _Hash(Protocol):
    def update(self, data: Tensor, /) -> None: ...
    def hexdigest(self) -> str: ...


class _Sha256:
    """The first 64 bits."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def update(self, data: Tensor) -> None:
        self._hash.update(memoryview(data.numpy()))

    def hexdigest(self) -> str:
        return self._hash.hexdigest()[:_NUM_HEX_DIGITS]


class HeldHashes:
    """Of one version, for the ranks of an engine with `layout` (`engine_layout.engine_layout`) on `device`."""

    def __init__(self, layout: Sequence[Sequence[EngineTensor]], device: Literal["cpu", "cuda"], itemsize: int):
        """`itemsize` is that of the engine's dtype, in bytes."""
        self._layout = layout
        self._hashes: list[dict[str, _Hash]] = [
            {tensor.name: _Sha256() if device == "cpu" else WordHash(tensor.num_elements * itemsize) for tensor in of_rank}
            for of_rank in layout
        ]
        self._num_parts = [dict.fromkeys(hashes, 0) for hashes in self._hashes]
        self._places: dict[str, list[tuple[int, EngineTensor]]] = defaultdict(list)
        for rank, of_rank in enumerate(layout):
            for tensor in of_rank:
                for part in tensor.parts:
                    self._places[part.hf_name].append((rank, tensor))

    def add(self, hf_name: str, tensor: Tensor) -> None:
        """Take in the next HF tensor, in the engine's dtype; on the host for an engine on CPUs. FingerprintError when it is not its turn."""
        for rank, held in self._places[hf_name]:
            index = self._num_parts[rank][held.name]
            if index >= len(held.parts) or held.parts[index].hf_name != hf_name:
                raise FingerprintError(
                    f"{hf_name} came out of turn for {held.name}; send tensors in the order of the mapping, once"
                )
            self._hashes[rank][held.name].update(_bytes(tensor[held.parts[index].slices]))
            self._num_parts[rank][held.name] += 1
            if index + 1 == len(held.parts) and held.num_zeros:
                self._hashes[rank][held.name].update(_zeros(held.num_zeros * tensor.element_size()))

    def finish(self) -> tuple[dict[str, str], ...]:
        """Name -> hash of each rank. FingerprintError when a tensor has not come."""
        for rank, of_rank in enumerate(self._layout):
            for tensor in of_rank:
                if self._num_parts[rank][tensor.name] != len(tensor.parts):
                    missing = tensor.parts[self._num_parts[rank][tensor.name]].hf_name
                    raise FingerprintError(f"{missing} was not sent; send every tensor before the version ends")
        return tuple({name: hash.hexdigest() for name, hash in hashes.items()} for hashes in self._hashes)


def differences(expected: Sequence[Mapping[str, str]], reported: Sequence[Mapping[str, Any]]) -> list[str]:
    """Sentences about tensors that an engine does not hold as they were sent; empty when it holds the version.

    `reported` is what the server's weights_checker says: per rank, `checksums` and a list with one `parallelism_info`.
    """
    numbers = sorted(int(entry["parallelism_info"][0]["tp_rank"]) for entry in reported)
    if numbers != list(range(len(expected))):
        return [f"reports tensor-parallel ranks {numbers} where {len(expected)} were expected"]
    ranks = {int(entry["parallelism_info"][0]["tp_rank"]): entry["checksums"] for entry in reported}
    sentences = []
    for rank, hashes in enumerate(expected):
        held = ranks[rank]
        kinds = {
            "differ from what was sent": [name for name, value in hashes.items() if held.get(name, value) != value],
            "are missing": [name for name in hashes if name not in held],
            "were never sent": [name for name in held if name not in hashes],
        }
        for kind, names in kinds.items():
            if names:
                shown = ", ".join(names[:_NUM_SHOWN]) + (", ..." if len(names) > _NUM_SHOWN else "")
                sentences.append(f"{len(names)} of {len(hashes)} tensors of rank {rank} {kind}: {shown}")
    return sentences


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _zeros(num_bytes: int) -> Tensor:
    return torch.zeros(num_bytes, dtype=torch.uint8)
