"""Packed sequences for the local layer spec: token positions and attention tiles, computed once a micro-batch.

Shape letters: T packed tokens, N sequences of a tile, L longest sequence of the tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

MAX_TILE_WASTE = 1.25
"""A tile may hold at most so many slots per real token."""


@dataclass
class PackedSequences(PackedSeqParams):
    """Sequences laid end to end, T tokens in all.

    Attention works on tiles: sequences of similar length side by side, right-padded, so that one causal kernel serves many of
    them. `gather` [sum N*L] picks the packed token of each tile slot (slot padding repeats token 0), `scatter` [T] the
    tile slot of each packed token. `qkv_format` is not "thd": megatron-core then treats the pack as one sequence of batch 1,
    and positions come from `positions` [T].
    """

    positions: Tensor | None = None
    tile_shapes: tuple[tuple[int, int], ...] = ()
    gather: Tensor | None = None
    scatter: Tensor | None = None


def pack_sequences(lengths: Sequence[int], device: torch.device) -> PackedSequences:
    """Describe sequences of the given lengths (tokens, all > 0) packed in this order."""
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    total = starts[-1]
    gather: list[Tensor] = []
    scatter = torch.empty(total, dtype=torch.long)
    shapes: list[tuple[int, int]] = []
    num_slots = 0
    for tile in _tiles(lengths):
        longest = lengths[tile[0]]
        shapes.append((len(tile), longest))
        index = torch.zeros(len(tile), longest, dtype=torch.long)
        for row, sequence in enumerate(tile):
            start, length = starts[sequence], lengths[sequence]
            index[row, :length] = torch.arange(start, start + length)
            first_slot = num_slots + row * longest
            scatter[start : start + length] = torch.arange(first_slot, first_slot + length)
        gather.append(index.flatten())
        num_slots += index.numel()
    return PackedSequences(
        qkv_format="sbhd",
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
        positions=torch.cat([torch.arange(length) for length in lengths]).to(device),
        tile_shapes=tuple(shapes),
        gather=torch.cat(gather).to(device),
        scatter=scatter.to(device),
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
