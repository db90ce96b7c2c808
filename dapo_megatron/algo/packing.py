"""Token-balanced micro-batches of whole sequences. Deterministic: the same lengths give the same cut."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from math import ceil


def balance(lengths: Sequence[int], num_bins: int) -> list[list[int]]:
    """Spread the indices of `lengths` over `num_bins` bins with sums as equal as a greedy choice makes them.

    Longest first into the emptiest bin (LPT): the fullest bin exceeds the best possible by a third at most. Of positive
    lengths no bin stays empty unless there are fewer lengths than bins.
    """
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    emptiest = [(0, at) for at in range(num_bins)]
    for index in _longest_first(lengths):
        total, at = emptiest[0]
        bins[at].append(index)
        heapq.heapreplace(emptiest, (total + lengths[index], at))
    return bins


RUNS_PER_SHARE = 4
"""Runs that fit into a micro-batch and into a rank's share at least: longer ones would fill and balance them badly."""


def runs_of_groups(lengths: Sequence[int], group_of: Sequence[int], *, num_ranks: int, max_tokens: int) -> list[list[int]]:
    """Cut sequences into runs of neighbours of one group, which stay in one micro-batch: their prompt is computed once there.

    A run has at most a `RUNS_PER_SHARE`th of the tokens of a micro-batch and, with several ranks, of a rank's share; or it is one
    sequence.
    """
    share = min(max_tokens, sum(lengths) // num_ranks) if num_ranks > 1 else max_tokens
    runs: list[list[int]] = []
    num_tokens = 0
    for index, length in enumerate(lengths):
        if runs and group_of[runs[-1][0]] == group_of[index] and (num_tokens + length) * RUNS_PER_SHARE <= share:
            runs[-1].append(index)
            num_tokens += length
        else:
            runs.append([index])
            num_tokens = length
    return runs


def pack_micro_batches(
    lengths: Sequence[int], *, num_ranks: int, max_tokens: int, num_micro_batches_multiple: int = 1
) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Cut sequences of `lengths` tokens into micro-batches: `[data-parallel rank][i]` holds indices into `lengths`.

    Each index appears once. A micro-batch has at most `max_tokens` tokens, or is one longer sequence. Every rank has the same
    number of micro-batches, a multiple of `num_micro_batches_multiple` (the interleaved pipeline schedule needs its pipeline
    size), and as few of them as best-fit-decreasing packs into: nearly always the fewest possible, asymptotically 11/9 of it
    at worst. Within that number tokens are balanced over ranks and over micro-batches. A micro-batch is empty only when there
    are fewer sequences than micro-batches.

    Micro-batches run from large to small, and those of one position have about the same size on all ranks: memory peaks
    first, and ranks that meet inside a micro-batch wait little. Raises ValueError for a length below 1.
    """
    if any(length < 1 for length in lengths):
        raise ValueError(f"lengths has {min(lengths)}; a sequence needs at least one token, leave out empty ones")
    bins = _best_fit(lengths, max_tokens)
    multiple = num_ranks * num_micro_batches_multiple
    num_slots = ceil(len(bins) / multiple) * multiple

    balanced = balance(lengths, num_slots)  # fits unless slots are nearly full; always fits with a slot for each sequence
    if all(len(bin_) <= 1 or _num_tokens(lengths, bin_) <= max_tokens for bin_ in balanced):
        bins = balanced
    else:
        bins = _split_heaviest(lengths, bins, num_slots)
    return _deal(lengths, bins, num_ranks)


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda index: -lengths[index])


def _num_tokens(lengths: Sequence[int], bin_: Sequence[int]) -> int:
    return sum(lengths[index] for index in bin_)


def _best_fit(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Bins of at most `max_tokens`: longest first into the fullest bin with room; a longer sequence is alone."""
    bins: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (free tokens, bin), ascending
    for index in _longest_first(lengths):
        length = lengths[index]
        tightest = bisect_left(free, (length, 0))
        if tightest == len(free):
            room, at = max_tokens, len(bins)
            bins.append([])
        else:
            room, at = free.pop(tightest)
        bins[at].append(index)
        insort(free, (room - length, at))
    return bins


def _split_heaviest(lengths: Sequence[int], bins: list[list[int]], num_bins: int) -> list[list[int]]:
    """Halve the heaviest bin of several sequences until there are `num_bins` bins, no more than there are sequences."""
    split = list(bins)
    while len(split) < num_bins:
        heaviest = max((bin_ for bin_ in split if len(bin_) > 1), key=lambda bin_: _num_tokens(lengths, bin_))
        split.remove(heaviest)
        split += [[heaviest[at] for at in half] for half in balance([lengths[index] for index in heaviest], 2)]
    return split


def _deal(lengths: Sequence[int], bins: list[list[int]], num_ranks: int) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Hand bins out in rounds, heaviest first; in each round the rank with the fewest tokens so far takes the heaviest."""
    heaviest_first = sorted(bins, key=lambda bin_: -_num_tokens(lengths, bin_))
    hands: list[list[tuple[int, ...]]] = [[] for _ in range(num_ranks)]
    totals = [0] * num_ranks
    for start in range(0, len(heaviest_first), num_ranks):
        poorest_first = sorted(range(num_ranks), key=lambda rank: totals[rank])
        for rank, bin_ in zip(poorest_first, heaviest_first[start : start + num_ranks], strict=True):
            hands[rank].append(tuple(sorted(bin_)))
            totals[rank] += _num_tokens(lengths, bin_)
    return tuple(tuple(hand) for hand in hands)
