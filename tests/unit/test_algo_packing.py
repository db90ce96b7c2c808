"""Micro-batch packing: every sequence once, within the token bound, balanced, few, fast."""

from __future__ import annotations

import random
import time
from itertools import product
from math import ceil

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dapo_megatron.algo.packing import balance, pack_micro_batches, runs_of_groups

reproducible = settings(derandomize=True, deadline=None)

lengths_lists = st.lists(st.integers(1, 40), min_size=0, max_size=60)


def rank_totals(packed: tuple[tuple[tuple[int, ...], ...], ...], lengths: list[int]) -> list[int]:
    return [sum(lengths[index] for micro_batch in rank for index in micro_batch) for rank in packed]


def test_balance_evens_out_sums():
    assert sorted(sum([7, 6, 5, 4, 3][at] for at in bin_) for bin_ in balance([7, 6, 5, 4, 3], 2)) == [11, 14]
    assert balance([5, 5, 5, 5], 2) == [[0, 2], [1, 3]]
    assert balance([4], 3) == [[0], [], []]
    assert balance([], 2) == [[], []]


@reproducible
@given(lengths_lists, st.integers(1, 9))
def test_balance_uses_every_index_once_and_stays_within_lpts_bound(lengths, num_bins):
    bins = balance(lengths, num_bins)
    assert sorted(index for bin_ in bins for index in bin_) == list(range(len(lengths)))
    totals = [sum(lengths[index] for index in bin_) for bin_ in bins]
    assert max(totals) - min(totals) <= max(lengths, default=0)
    assert sum(not bin_ for bin_ in bins) == max(0, num_bins - len(lengths))


@reproducible
@given(lengths_lists, st.integers(1, 4), st.integers(1, 60), st.integers(1, 4))
@example([6, 5, 4, 3, 2], 1, 10, 1)  # two micro-batches are enough for best fit, not for a balanced cut
@example([13, 13, 12, 11, 11, 9, 9, 9, 8, 7, 7, 6, 5, 5, 5, 5, 5], 2, 20, 1)  # ... as are 7 of 8, so one has to be split
@example([50, 1, 1], 2, 10, 1)  # one sequence beyond max_tokens
@example([], 2, 10, 1)
def test_packing_invariants(lengths, num_ranks, max_tokens, multiple):
    packed = pack_micro_batches(lengths, num_ranks=num_ranks, max_tokens=max_tokens, num_micro_batches_multiple=multiple)
    micro_batches = [micro_batch for rank in packed for micro_batch in rank]

    assert sorted(index for micro_batch in micro_batches for index in micro_batch) == list(range(len(lengths)))
    assert len(packed) == num_ranks
    num_micro_batches = len(packed[0])
    assert all(len(rank) == num_micro_batches for rank in packed)
    assert num_micro_batches % multiple == 0
    assert all(len(micro_batch) <= 1 or sum(lengths[at] for at in micro_batch) <= max_tokens for micro_batch in micro_batches)
    assert sum(not micro_batch for micro_batch in micro_batches) == max(0, len(micro_batches) - len(lengths))
    assert pack_micro_batches(lengths, num_ranks=num_ranks, max_tokens=max_tokens, num_micro_batches_multiple=multiple) == packed
    for rank in packed:
        sizes = [sum(lengths[at] for at in micro_batch) for micro_batch in rank]
        assert sizes == sorted(sizes, reverse=True)


def fewest_bins(lengths: list[int], max_tokens: int) -> int:
    """The optimum, by trying every assignment."""
    for num_bins in range(1, len(lengths) + 1):
        for assignment in product(range(num_bins), repeat=len(lengths)):
            totals = [0] * num_bins
            for length, at in zip(lengths, assignment, strict=True):
                totals[at] += length
            if max(totals) <= max_tokens:
                return num_bins
    return 0


@reproducible
@given(st.lists(st.integers(1, 10), min_size=1, max_size=5), st.integers(10, 16))
@example([4, 3, 6, 7], 10)  # 7 + 3 and 6 + 4: found when the longest go first
def test_number_of_micro_batches_is_the_optimum_on_small_inputs(lengths, max_tokens):
    assert len(pack_micro_batches(lengths, num_ranks=1, max_tokens=max_tokens)[0]) == fewest_bins(lengths, max_tokens)


def test_number_of_micro_batches_is_the_lower_bound_rounded_up_to_the_multiple():
    lengths = [100] * 60  # 10 fit into a micro-batch: 6 of them, 3 a rank
    assert len(pack_micro_batches(lengths, num_ranks=2, max_tokens=1000)[0]) == 3
    assert len(pack_micro_batches(lengths, num_ranks=2, max_tokens=1000, num_micro_batches_multiple=4)[0]) == 4


def test_ranks_and_micro_batches_of_a_realistic_step_are_balanced():
    rng = random.Random(0)
    lengths = [min(22_000, 200 + int(rng.expovariate(1 / 5000))) for _ in range(512)]
    packed = pack_micro_batches(lengths, num_ranks=8, max_tokens=22_000)
    totals = rank_totals(packed, lengths)
    assert max(totals) < 1.02 * sum(totals) / 8
    assert len(packed[0]) <= 1 + ceil(sum(lengths) / 22_000 / 8)


def test_rank_with_the_larger_micro_batches_gets_the_smaller_ones_next():
    packed = pack_micro_batches([100, 90, 50, 40], num_ranks=2, max_tokens=100)
    assert packed == (((0,), (3,)), ((1,), (2,)))
    assert rank_totals(packed, [100, 90, 50, 40]) == [140, 140]


@pytest.mark.parametrize(
    ("num_ranks", "max_tokens", "runs"),
    [
        (1, 120, [[0, 1, 2], [3, 4, 5], [6, 7]]),
        (1, 80, [[0, 1], [2], [3, 4], [5], [6, 7]]),
        (2, 120, [[0], [1], [2], [3], [4], [5], [6], [7]]),
    ],
)
def test_a_run_is_of_one_group_and_a_fourth_of_a_micro_batch_and_of_a_ranks_share(num_ranks, max_tokens, runs):
    lengths, group_of = [10] * 8, [0, 0, 0, 1, 1, 1, 2, 2]
    assert runs_of_groups(lengths, group_of, num_ranks=num_ranks, max_tokens=max_tokens) == runs


def test_8192_sequences_are_packed_in_a_fraction_of_a_second():
    rng = random.Random(0)
    lengths = [rng.randint(200, 22_000) for _ in range(8192)]
    start = time.process_time()
    pack_micro_batches(lengths, num_ranks=8, max_tokens=22_000)
    assert time.process_time() - start < 0.3


def test_sequence_without_tokens_is_refused():
    with pytest.raises(ValueError, match="at least one token"):
        pack_micro_batches([3, 0], num_ranks=1, max_tokens=8)
