"""Device memory that moves to pinned host memory and back under the same tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, UntypedStorage

PIECE_BYTES = 2**28
"""Host memory is taken in pieces of this size: torch rounds each pinned allocation up to a power of two."""


class HostCopy:
    """Of some storages, one behind the other; its host memory is kept for the next time."""

    def __init__(self, device: torch.device):
        self._device = device
        self._pieces: list[Tensor] = []
        self._taken: list[tuple[UntypedStorage, int]] = []

    @property
    def num_bytes(self) -> int:
        """Held now."""
        return sum(num_bytes for _, num_bytes in self._taken)

    def take(self, storages: Sequence[UntypedStorage]) -> None:
        """Copy them and free their device memory. Tensors on them must not be read until `give_back`."""
        assert not self._taken, "what was taken before has not been given back"
        self._taken = [(storage, storage.nbytes()) for storage in storages]
        for flat, host in self._pairs():
            host.copy_(flat, non_blocking=True)
        self._wait()
        for storage in storages:
            storage.resize_(0)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # else other processes cannot have it

    def give_back(self) -> None:
        """The storages have their memory and bytes again, at other addresses."""
        for storage, num_bytes in self._taken:
            storage.resize_(num_bytes)
        for flat, host in self._pairs():
            flat.copy_(host, non_blocking=True)
        self._wait()
        self._taken = []

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Stretches of the storages with their places on the host."""
        start = 0
        for storage, num_bytes in self._taken:
            flat = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
            done = 0
            while done < num_bytes:
                piece, offset = divmod(start, PIECE_BYTES)
                length = min(num_bytes - done, PIECE_BYTES - offset)
                yield flat[done : done + length], self._piece(piece)[offset : offset + length]
                done, start = done + length, start + length

    def _piece(self, index: int) -> Tensor:
        if index == len(self._pieces):
            self._pieces.append(torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=self._device.type == "cuda"))
        return self._pieces[index]

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def storages_of(tensors: Iterable[Tensor]) -> list[UntypedStorage]:
    """The storages that tensors lie in, each once, in order; those without bytes are left out."""
    found = {storage.data_ptr(): storage for tensor in tensors if (storage := tensor.untyped_storage()).nbytes()}
    return list(found.values())
