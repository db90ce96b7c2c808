"""Context parallelism: each rank of a group has a part of every packed sequence.

Shape letters: T packed tokens, C ranks of the group, N pieces of a tile, L longest of them.

A sequence is padded at its end to a multiple of 2 C tokens and cut into 2 C chunks; rank r has chunks r and 2 C - 1 - r, in this order, so
that causal attention takes all ranks the same time. It is how megatron-core and TransformerEngine cut, which work out positions by it.
Padding counts as tokens of its sequence: none before it attends to it, and none is trained on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dapo_megatron.models.packed import PackedSequences, consecutive, tiles


@dataclass(frozen=True, slots=True)
class ContextShare:
    """Which part of every sequence this is: that of rank `rank` of `size`."""

    rank: int = 0
    size: int = 1

    @property
    def sequence_multiple(self) -> int:
        """What a sequence is padded to."""
        return 2 * self.size if self.size > 1 else 1

    @property
    def chunks(self) -> tuple[int, int]:
        """Numbers of the chunks that the rank has of each sequence."""
        return self.rank, 2 * self.size - 1 - self.rank

    def places(self, lengths: np.ndarray) -> np.ndarray:
        """Of padded sequences that lie one after the other: the places in the whole pack of the rank's tokens, int64 [T / C]."""
        chunk, starts = lengths // (2 * self.size), np.cumsum(lengths) - lengths
        firsts = np.stack([starts + number * chunk for number in self.chunks], axis=1)
        return consecutive(firsts.ravel(), np.repeat(chunk, 2))


@dataclass
class ContextParallelSequences(PackedSequences):
    """The rank's tokens of sequences that are cut over a group, and which of all ranks' keys and values they look at.

    A tile has chunks of one number: queries of its own tokens ([N, L], `tile_shapes`, `gather` and `scatter` as in `PackedSequences`) and keys
    of the sequences from their beginning to the end of the chunk ([N, `key_lengths`]). `key_gather` has their places where the tokens of
    all ranks, [T], stand rank after rank.
    """

    key_lengths: tuple[int, ...] = ()
    key_gather: Tensor | None = None

    @property
    def num_keys(self) -> tuple[int, ...]:
        return self.key_lengths


def pack_context_parallel(lengths: np.ndarray, share: ContextShare, device: torch.device) -> ContextParallelSequences:
    """Describe padded sequences that lie one after the other in the whole pack. `positions` are those of the rank's tokens."""
    starts = np.cumsum(lengths) - lengths
    own = share.places(lengths)
    by_rank = np.concatenate([ContextShare(rank, share.size).places(lengths) for rank in range(share.size)])
    place_by_rank = np.empty_like(by_rank)
    place_by_rank[by_rank] = np.arange(len(by_rank))

    order = np.argsort(-lengths, kind="stable")
    sizes, starts_in_order = lengths[order] // (2 * share.size), starts[order]
    shapes = tiles(sizes.tolist())
    ends = np.cumsum([count for count, _ in shapes])
    gathers, key_gathers, masks, key_lengths = [], [], [], []
    scatter = np.empty(len(own), dtype=np.int64)
    first_slot = 0
    for half, number in enumerate(share.chunks):
        for (count, longest), end in zip(shapes, ends, strict=True):
            size, start = sizes[end - count : end], starts_in_order[end - count : end]
            local = start // share.size + half * size
            in_tile = np.arange(count) * longest
            slots, tokens = consecutive(in_tile, size), consecutive(local, size)
            gather = np.zeros(count * longest, dtype=np.int64)
            gather[slots] = tokens
            scatter[tokens] = first_slot + slots
            first_slot += count * longest
            key_length = (number + 1) * longest
            key_gather = np.zeros(count * key_length, dtype=np.int64)
            seen = (number + 1) * size
            key_gather[consecutive(np.arange(count) * key_length, seen)] = place_by_rank[consecutive(start, seen)]
            gathers.append(gather)
            key_gathers.append(key_gather)
            key_lengths.append(key_length)
            masks.append(_mask(number * size, longest, key_length, device))
    positions = own - np.repeat(starts, lengths)[own]
    return ContextParallelSequences(
        qkv_format="sbhd",
        max_seqlen_q=int(lengths.max()),
        max_seqlen_kv=int(lengths.max()),
        positions=torch.from_numpy(positions).to(device),
        tile_shapes=tuple(shapes) * 2,
        tile_masks=tuple(masks),
        gather=torch.from_numpy(np.concatenate(gathers)).to(device),
        scatter=torch.from_numpy(scatter).to(device),
        key_lengths=tuple(key_lengths),
        key_gather=torch.from_numpy(np.concatenate(key_gathers)).to(device),
    )


def _mask(first_positions: np.ndarray, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """[N, 1, queries, keys]: a token sees its sequence up to itself."""
    first = torch.from_numpy(first_positions).to(device)[:, None, None, None]
    queries = torch.arange(num_queries, device=device)[:, None]
    return torch.arange(num_keys, device=device) <= first + queries
