"""Proof, for every version, that the tensors which were gathered are those that the ranks hold, and that copies of them are equal.

Each rank hashes what it holds where it lies (`weights/place_hash.py`); the assembler hashes the tensors it has put together. Places come
from the mapping and the ranks' boxes, and from nothing of the plan by which chunks are sent, so that a chunk which goes astray shows.
A version ends with the hashes of all ranks, in one collective that each of them comes to when it has sent its last chunk.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from dapo_megatron.actor.live_weights import LiveBox
from dapo_megatron.types import FingerprintError
from dapo_megatron.weights.place_hash import PlaceHash
from dapo_megatron.weights.plan import ModelMapping
from dapo_megatron.weights.share_ledger import Share, ShareLedger, share_table, shares_of
from dapo_megatron.weights.sync import BucketPiece


class ShardCheck:
    """One per rank, collective: `begin`, on the assembler `add` for every bucket, then `finish`.

    Extra memory: that of `place_hash.CHUNK_WORDS`, and some 8 bytes for each tensor that any rank holds a piece of.
    """

    def __init__(self, mapping: ModelMapping, live: Sequence[LiveBox], dtype: str, assembler: int, *, compare_copies: bool):
        """`dtype` is that of the wire, by its torch name. `compare_copies`: what a rank holds of another one's must be equal too."""
        self._assembler, self._shapes = assembler, mapping.hf_tensors
        self._dtypes = {name: getattr(torch, mapping.dtype_of(name, dtype)) for name in mapping.hf_tensors}
        self._live = [item for item in live if item.is_owner or compare_copies]
        self._shares = shares_of(mapping, [item.box for item in self._live])
        self._device = live[0].data.device
        self._hashes = {
            of_some: PlaceHash(
                (shape for name, shape in self._shapes.items() if self._dtypes[name] == of_some), of_some, self._device
            )
            for of_some in set(self._dtypes.values())
        }
        self._numbers = {name: number for number, name in enumerate(mapping.hf_tensors)}
        tables: list = [None] * dist.get_world_size()
        dist.all_gather_object(tables, share_table(mapping, self._shares, [item.is_owner for item in self._live]))
        self._ledger = ShareLedger(tuple(mapping.hf_tensors), tables)

    def begin(self, version: int) -> None:
        """A version begins, whatever became of the one before."""
        self._version = version
        self._gathered = self._zeros(len(self._numbers))
        self.seconds = 0.0
        """What this rank has spent on the version's hashes, waiting for those of other ranks included."""

    def add(self, pieces: Sequence[BucketPiece], payload: Tensor) -> None:
        """Take in a bucket as it was gathered, uint8 on any device."""
        with self._timed():
            for piece in pieces:
                columns = self._shapes[piece.name][1:]
                raw = payload[piece.byte_offset : piece.byte_offset + piece.num_bytes].view(self._dtypes[piece.name])
                places = slice(piece.row_start, piece.row_start + piece.num_rows), *(slice(0, size) for size in columns)
                hashed = self._hash_for(piece.name).of(raw.view(piece.num_rows, *columns), places)
                self._gathered[self._numbers[piece.name]] += hashed

    def finish(self) -> None:
        """Every rank has sent its last chunk. FingerprintError on the assembler, with tensors and ranks, when something differs."""
        with self._timed():
            own, of_all = (self._zeros(number * max(self._ledger.num_shares)) for number in (1, dist.get_world_size()))
            if self._shares:
                own[: len(self._shares)] = torch.stack([self._hash_of(share) for share in self._shares])
            dist.all_gather_into_tensor(of_all, own)  # one to one, NCCL would make a communicator for each rank
            if dist.get_rank() == self._assembler:
                self._compare(of_all)

    def _compare(self, of_all: Tensor) -> None:
        rows = of_all.view(dist.get_world_size(), -1).cpu().numpy()
        by_rank = [row[:num_shares] for row, num_shares in zip(rows, self._ledger.num_shares, strict=True)]
        if wrong := self._ledger.differences(self._gathered.cpu().numpy(), by_rank):
            raise FingerprintError(
                f"weights of version {self._version} are not one model: {'; '.join(wrong)}; do not generate with them, "
                "go on from the newest checkpoint"
            )

    def _hash_for(self, hf_name: str) -> PlaceHash:
        return self._hashes[self._dtypes[hf_name]]

    def _hash_of(self, share: Share) -> Tensor:
        place_hash = self._hash_for(share.hf_name)
        parts = [place_hash.of(self._live[copy.box_index].data[copy.box_slices], copy.hf_slices) for copy in share.copies]
        return torch.stack(parts).sum()

    def _zeros(self, length: int) -> Tensor:
        return torch.zeros(length, dtype=torch.int64, device=self._device)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start
