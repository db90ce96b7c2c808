"""Which shares of the HF tensors the ranks hold, and what their hashes (`place_hash.py`) must be to each other.

A share is what one box holds of one HF tensor. The owners' shares of a tensor add up to the tensor; every other share is a copy of an
owner's (data-parallel replicas, norms of tensor-parallel ranks, the embedding of a tied last stage) and equal to it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from dapo_megatron.types import MappingError
from dapo_megatron.weights.plan import Box, Copy, ModelMapping, import_plan

_NUM_SHOWN, _NUM_RANKS_SHOWN = 3, 8


@dataclass(frozen=True, slots=True)
class Share:
    """What `copies`, all of one box, hold of one HF tensor."""

    hf_name: str
    copies: tuple[Copy, ...]


@dataclass(frozen=True, slots=True, eq=False)
class ShareTable:
    """The shares of one rank, [shares] each; what the ledger knows of it."""

    tensors: np.ndarray
    """int32: which of `ModelMapping.hf_tensors`, counted from 0."""
    areas: np.ndarray
    """uint64: equal for shares of the same elements."""
    owned: np.ndarray
    """bool: whether the rank is the one that sends it."""


def shares_of(mapping: ModelMapping, boxes: Sequence[Box]) -> tuple[Share, ...]:
    """In the order of the boxes; a box may have shares of several tensors (q, k and v), or none (all of it padding)."""
    copies: dict[tuple[int, str], list[Copy]] = defaultdict(list)
    for copy in import_plan(mapping, boxes):
        copies[copy.box_index, copy.hf_name].append(copy)
    return tuple(Share(hf_name, tuple(of_share)) for (_, hf_name), of_share in copies.items())


def share_table(mapping: ModelMapping, shares: Sequence[Share], owned: Sequence[bool]) -> ShareTable:
    """`owned` has an entry for each box, the shares' `box_index`."""
    numbers = {name: number for number, name in enumerate(mapping.hf_tensors)}
    return ShareTable(
        np.array([numbers[share.hf_name] for share in shares], np.int32),
        np.array([_area(share) for share in shares], np.uint64),
        np.array([owned[share.copies[0].box_index] for share in shares], np.bool_),
    )


class ShareLedger:
    """Of all ranks; compares what they say of one version."""

    def __init__(self, names: Sequence[str], tables: Sequence[ShareTable]):
        """`names` are those of `ModelMapping.hf_tensors`. MappingError for a copy of elements that no owner holds as one share."""
        self._names = tuple(names)
        self.num_shares = tuple(len(table.tensors) for table in tables)
        """By rank."""
        self._ranks = np.repeat(np.arange(len(tables)), self.num_shares)
        self._tensors = np.concatenate([table.tensors for table in tables])
        areas, owned = (np.concatenate([getattr(table, field) for table in tables]) for field in ("areas", "owned"))
        self._owners, self._copies = np.flatnonzero(owned), np.flatnonzero(~owned)
        by_area = self._owners[np.argsort(areas[self._owners], kind="stable")]
        places = np.searchsorted(areas[by_area], areas[self._copies])
        self._copied = by_area[np.minimum(places, len(by_area) - 1)]
        strange = self._copies[areas[self._copied] != areas[self._copies]]
        if len(strange):
            name, rank = self._names[self._tensors[strange[0]]], self._ranks[strange[0]]
            raise MappingError(
                f"{name}: rank {rank} holds a copy of elements that no rank owns as one piece; pass all live boxes"
            )

    def differences(self, gathered: np.ndarray, by_rank: Sequence[np.ndarray]) -> list[str]:
        """Sentences about what is wrong, with tensors and ranks; empty when the ranks hold what was gathered.

        `gathered` is int64 [tensors], the hashes of the tensors that were put together; `by_rank[rank]` is int64 [shares] of that rank.
        """
        values = np.concatenate(by_rank)
        sums = np.zeros_like(gathered)
        np.add.at(sums, self._tensors[self._owners], values[self._owners])  # wraps around, as the hash does
        misplaced = np.flatnonzero(sums != gathered)
        diverged: dict[int, set[int]] = defaultdict(set)
        different = values[self._copies] != values[self._copied]
        for copy, owner in zip(self._copies[different], self._copied[different], strict=True):
            diverged[int(self._tensors[copy])] |= {int(self._ranks[owner]), int(self._ranks[copy])}
        sentences = []
        if len(misplaced):
            shown = self._shown(misplaced, {int(tensor): self._owners_of(tensor) for tensor in misplaced[:_NUM_SHOWN]})
            sentences.append(f"{len(misplaced)} tensors were not gathered as their ranks hold them: {shown}")
        if diverged:
            shown = self._shown(sorted(diverged), diverged)
            sentences.append(
                f"{len(diverged)} tensors differ between ranks that hold copies of them: {shown} (rollout.compare_weight_copies false, "
                "where kernels are known to let them drift)"
            )
        return sentences

    def _owners_of(self, tensor: int) -> set[int]:
        return {int(rank) for rank in self._ranks[self._owners[self._tensors[self._owners] == tensor]]}

    def _shown(self, tensors: Sequence[int] | np.ndarray, ranks_of: Mapping[int, set[int]]) -> str:
        """The first of `tensors` with their ranks."""
        shown = [f"{self._names[tensor]} ({_listed(ranks_of[int(tensor)])})" for tensor in tensors[:_NUM_SHOWN]]
        return ", ".join(shown) + (", ..." if len(tensors) > _NUM_SHOWN else "")


def _area(share: Share) -> int:
    places = [(part.start, part.stop) for copy in share.copies for part in copy.hf_slices]
    return xxhash.xxh3_64_intdigest(f"{share.hf_name} {places}".encode())


def _listed(ranks: set[int]) -> str:
    shown = ", ".join(str(rank) for rank in sorted(ranks)[:_NUM_RANKS_SHOWN])
    return f"rank{'s' * (len(ranks) > 1)} {shown}" + (", ..." if len(ranks) > _NUM_RANKS_SHOWN else "")
