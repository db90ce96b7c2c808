"""avg@k, pass@k and maj@k against brute force."""

import itertools
import math
import random
import statistics

import pytest

from dapo_megatron.eval.statistics import (
    Estimate,
    majority_accuracy,
    pass_at_k,
    pass_ks,
    sampling_standard_error,
)


@pytest.mark.parametrize("num_samples", range(1, 8))
def test_pass_at_k_is_the_share_of_all_subsets_with_a_correct_sample(num_samples):
    for num_correct, k in itertools.product(range(num_samples + 1), range(1, num_samples + 1)):
        samples = [index < num_correct for index in range(num_samples)]
        subsets = list(itertools.combinations(samples, k))
        assert pass_at_k(num_samples, num_correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_pass_at_k_is_unbiased():
    """Over all outcomes of 5 samples that are correct with probability p, its mean is 1 - (1 - p)^k."""
    p, n = 0.3, 5
    for k in range(1, n + 1):
        mean = sum(math.comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at_k(n, c, k) for c in range(n + 1))
        assert mean == pytest.approx(1 - (1 - p) ** k, abs=1e-12)


def test_pass_at_k_of_many_samples_neither_overflows_nor_rounds_to_one():
    assert 0 < 1 - pass_at_k(4096, 2, 2048) < 1


@pytest.mark.parametrize(("num_samples", "expected"), [(1, [1]), (2, [1, 2]), (5, [1, 2, 4]), (32, [1, 2, 4, 8, 16, 32])])
def test_ks_are_powers_of_two_up_to_the_samples(num_samples, expected):
    assert pass_ks(num_samples) == expected


def test_pass_at_1_is_the_accuracy():
    assert pass_at_k(7, 3, 1) == pytest.approx(3 / 7)


def test_standard_error_is_that_of_the_mean_over_problems():
    shares = [random.Random(0).random() for _ in range(30)]
    estimate = Estimate.over_problems(shares)
    assert estimate.value == pytest.approx(statistics.fmean(shares))
    assert estimate.standard_error == pytest.approx(statistics.stdev(shares) / math.sqrt(30))


def test_standard_error_does_not_shrink_with_samples_that_repeat_each_other():
    """32 equal samples of a problem say no more than one."""
    one, many = ([c / n for c in (0, n, n, 0, n)] for n in (1, 32))
    assert Estimate.over_problems(one) == Estimate.over_problems(many)
    assert sampling_standard_error(32, [0, 32, 32, 0, 32]) == 0.0


def test_one_problem_has_no_standard_error():
    assert Estimate.over_problems([0.25]) == Estimate(0.25, None)


def test_sampling_standard_error_is_unbiased_in_the_variance():
    """Over all outcomes of 3 samples to each of 2 problems, its square has the variance of avg@3 as its mean."""
    p, n = (0.2, 0.7), 3

    def probability(counts):
        return math.prod(math.comb(n, c) * q**c * (1 - q) ** (n - c) for c, q in zip(counts, p, strict=True))

    outcomes = list(itertools.product(range(n + 1), repeat=2))
    mean_square = sum(probability(counts) * sampling_standard_error(n, counts) ** 2 for counts in outcomes)
    variance = sum(probability(counts) * (sum(counts) / n / 2 - sum(p) / 2) ** 2 for counts in outcomes)
    assert mean_square == pytest.approx(variance)
    assert sampling_standard_error(1, [1, 0]) is None


@pytest.mark.parametrize(
    ("answers", "correct", "expected"),
    [
        (["3", "3", "4"], [True, True, False], 1.0),
        (["4", "3", "4"], [False, True, False], 0.0),
        (["3", "4"], [True, False], 0.5),
        (["3", "4", "5"], [False, False, True], 1 / 3),
        ([None, None, None, "3"], [False, False, False, True], 1.0),
        ([None, None], [False, False], 0.0),
        (["3", "3", "4"], [True, False, False], 0.5),
    ],
    ids=["majority", "minority", "tie", "three-way tie", "no answer, no vote", "no votes", "mixed verdicts"],
)
def test_majority(answers, correct, expected):
    assert majority_accuracy(answers, correct) == pytest.approx(expected)


def test_majority_equals_drawing_among_the_most_frequent():
    """Against the definition: shuffle the samples, let the first of the most frequent answers win; mean over all orders."""
    answers, correct = ["a", "b", "b", "c", "a", None], [True, False, False, True, True, False]

    def winner(order):
        voted = [answers[i] for i in order if answers[i] is not None]
        best = max(voted, key=lambda answer: (voted.count(answer), -voted.index(answer)))
        return correct[answers.index(best)]

    orders = list(itertools.permutations(range(6)))
    assert majority_accuracy(answers, correct) == pytest.approx(sum(map(winner, orders)) / len(orders))
