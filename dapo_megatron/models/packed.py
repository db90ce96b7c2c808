"""Packed sequences for the local layer spec: token positions and attention tiles, computed once a micro-batch.

Shape letters: T packed tokens, N sequences of a tile, L longest sequence of the tile.
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
    them. `gather` [sum N*L] picks the packed token of each tile slot (slot padding repeats token 0), `scatter` [T] a
    tile slot of each packed token; both are None where slots and tokens are the same, as in a pack of one sequence. `qkv_format`
    is not "thd": megatron-core then treats the pack as one sequence of batch 1, and positions come from `positions` [T].
    `rotation` is what the rotary embedding makes of them: cosine and sine [T, 1, 1, head_dim / 2].
    """

    positions: Tensor | None = None
    tile_shapes: tuple[tuple[int, int], ...] = ()
    gather: Tensor | None = None
    scatter: Tensor | None = None
    rotation: tuple[Tensor, Tensor] | None = None


def pack_sequences(sequences: Sequence[np.ndarray], device: torch.device) -> PackedSequences:
    """Describe sequences by the places of their tokens in the pack, int64, in order; together they cover [0, T).

    Sequences that share places must agree in everything before the last shared one: keys, values and outputs of a shared prefix
    are the same in all of them, so it does not matter whose slot `scatter` reads.
    """
    lengths = [len(sequence) for sequence in sequences]
    total = 1 + max(int(sequence.max()) for sequence in sequences)
    positions = np.empty(total, dtype=np.int64)
    scatter = np.empty(total, dtype=np.int64)
    gather: list[np.ndarray] = []
    shapes: list[tuple[int, int]] = []
    first_slot = 0
    for tile in _tiles(lengths):
        longest = lengths[tile[0]]
        shapes.append((len(tile), longest))
        places = np.zeros((len(tile), longest), dtype=np.int64)
        for row, index in enumerate(tile):
            sequence, length = sequences[index], lengths[index]
            places[row, :length] = sequence
            positions[sequence] = np.arange(length)
            scatter[sequence] = first_slot + np.arange(length)
            first_slot += longest
        gather.append(places.ravel())
    slots = np.concatenate(gather)
    is_permuted = not np.array_equal(slots, np.arange(total))
    return PackedSequences(
        qkv_format="sbhd",
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
        positions=torch.from_numpy(positions).to(device),
        tile_shapes=tuple(shapes),
        gather=torch.from_numpy(slots).to(device) if is_permuted else None,
        scatter=torch.from_numpy(scatter).to(device) if is_permuted else None,
    )


def _tiles(lengths: Sequence[int]) -> list[list[int]]:
    """Sequence indices grouped by similar length, longest first; stable, so deterministic."""
    tiles: list[list[int]] = []
    real = 0
    for sequence in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[sequence]
        if tiles:
            slots = (len(tiles[-1]) + 1) * lengths[tiles[-1][0]]
            if slots <= MAX_TILE_WASTE * (real + length):
                tiles[-1].append(sequence)
                real += length
                continue
        tiles.append([sequence])
        real = length
    return tiles
