"""Packed sequences for the local layer spec: token positions and attention tiles, computed once a micro-batch.

Shape letters: T packed tokens, N sequences (or trees) of a tile, L longest of the tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

MAX_TILE_WASTE = 1.25
"""A tile may hold at most so many slots per real token."""


@dataclass
class PackedSequences(PackedSeqParams):
    """Sequences over T packed tokens. Sequences may have a prefix in common, whose tokens are then packed once.

    Attention works on tiles: sequences of similar length side by side, right-padded, so that one causal kernel serves many of
    them, or trees, each under its mask. `gather` [sum N*L] picks the packed token of each tile slot (slot padding repeats token 0),
    `scatter` [T] a tile slot of each packed token; both are None where slots and tokens are the same, as in a pack of one sequence.
    `qkv_format` is not "thd": megatron-core then treats the pack as one sequence of batch 1, and positions come from `positions` [T].
    `rotation` is what the rotary embedding makes of them: cosine and sine [T, 1, 1, head_dim / 2].
    """

    positions: Tensor | None = None
    tile_shapes: tuple[tuple[int, int], ...] = ()
    tile_masks: tuple[Tensor, ...] | None = None
    gather: Tensor | None = None
    scatter: Tensor | None = None
    rotation: tuple[Tensor, Tensor] | None = None

    @property
    def num_keys(self) -> tuple[int, ...]:
        """Keys that each tile has of a sequence."""
        return tuple(longest for _, longest in self.tile_shapes)


def pack_sequences(places: np.ndarray, lengths: np.ndarray, device: torch.device) -> PackedSequences:
    """Describe sequences by the places of their tokens in the pack, int64 [sum of lengths], in order; together they cover [0, T).

    Sequences that share places must agree in everything before the last shared one: keys, values and outputs of a shared prefix
    are the same in all of them, so it does not matter whose slot `scatter` reads.
    """
    return _packed(places, lengths, consecutive(np.zeros_like(lengths), lengths), None, device)


def pack_trees(
    places: np.ndarray, lengths: np.ndarray, positions: np.ndarray, branches: np.ndarray, device: torch.device
) -> PackedSequences:
    """As `pack_sequences`, of trees: each is a trunk and branches that go on from its end, one after the other.

    `places` has every place of the pack once. `positions` are those in trunk and branch together, `branches` tell the branches of a tree
    apart and are 0 in its trunk; both int64 [sum of lengths].
    """
    return _packed(places, lengths, positions, branches, device)


def _packed(
    places: np.ndarray, lengths: np.ndarray, positions: np.ndarray, branches: np.ndarray | None, device: torch.device
) -> PackedSequences:
    order = np.argsort(-lengths, kind="stable")
    lengths, starts = lengths[order], (np.cumsum(lengths) - lengths)[order]
    tokens = consecutive(starts, lengths)
    places, positions = places[tokens], positions[tokens]
    shapes = tiles(lengths.tolist())
    first_slots = np.array([0, *np.repeat([longest for _, longest in shapes], [count for count, _ in shapes])]).cumsum()
    slots = consecutive(first_slots[:-1], lengths)
    gather = np.zeros(first_slots[-1], dtype=np.int64)
    gather[slots] = places
    total = 1 + int(places.max())
    positions_of_places = np.empty(total, dtype=np.int64)
    positions_of_places[places] = positions
    scatter = np.empty(total, dtype=np.int64)
    scatter[places] = slots
    is_permuted = not np.array_equal(gather, np.arange(total))
    masks: tuple[Tensor, ...] | None = None
    if branches is not None:
        branch_of_slot = np.zeros(len(gather), dtype=np.int64)
        branch_of_slot[slots] = branches[tokens]
        masks = _masks(torch.from_numpy(branch_of_slot).to(device), shapes)
    return PackedSequences(
        qkv_format="sbhd",
        max_seqlen_q=int(lengths[0]),
        max_seqlen_kv=int(lengths[0]),
        positions=torch.from_numpy(positions_of_places).to(device),
        tile_shapes=tuple(shapes),
        tile_masks=masks,
        gather=torch.from_numpy(gather).to(device) if is_permuted else None,
        scatter=torch.from_numpy(scatter).to(device) if is_permuted else None,
    )


def _masks(branch_of_slot: Tensor, shapes: Sequence[tuple[int, int]]) -> tuple[Tensor, ...]:
    """Of each tile [N, 1, L, L]: a token sees the trunk and its own branch, each up to itself."""
    masks = []
    for branches, (count, longest) in zip(
        branch_of_slot.split([count * longest for count, longest in shapes]), shapes, strict=True
    ):
        branch = branches.view(count, 1, longest)
        is_seen = (branch == 0) | (branch == branch.transpose(1, 2))
        masks.append(is_seen.tril_()[:, None])
    return tuple(masks)


def consecutive(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """starts[0], starts[0] + 1, .. (lengths[0] of them), then those of starts[1]: int64 [sum of lengths]."""
    return np.repeat(starts - (np.cumsum(lengths) - lengths), lengths) + np.arange(lengths.sum())


def tiles(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Shapes (number of sequences, length of the longest) of tiles of neighbours; `lengths` fall."""
    shapes: list[tuple[int, int]] = []
    real = 0
    for length in lengths:
        if shapes:
            count, longest = shapes[-1]
            if (count + 1) * longest <= MAX_TILE_WASTE * (real + length):
                shapes[-1] = (count + 1, longest)
                real += length
                continue
        shapes.append((1, length))
        real = length
    return shapes
