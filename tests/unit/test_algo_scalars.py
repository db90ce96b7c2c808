"""Advantages, the dynamic-sampling rule, soft overlong punishment and loss aggregation: the rules on plain numbers."""

from __future__ import annotations

import statistics
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dapo_megatron.algo.advantage import group_advantages
from dapo_megatron.algo.aggregation import sample_loss_weights
from dapo_megatron.algo.dynamic_sampling import has_learning_signal
from dapo_megatron.algo.overlong import soft_overlong_punishment

reproducible = settings(derandomize=True, deadline=None)

rewards_lists = st.lists(st.floats(-2, 2).map(lambda value: round(value, 3)), min_size=2, max_size=16)


# advantages


def test_advantages_of_one_correct_sample_in_four_match_hand_computed_values():
    rewards = [1.0, -1.0, -1.0, -1.0]  # mean -0.5, squares of deviations 2.25 + 3 * 0.25 = 3
    assert group_advantages(rewards, normalize_by_std=False, std="sample") == [1.5, -0.5, -0.5, -0.5]
    assert group_advantages(rewards, normalize_by_std=True, std="sample", eps=0) == [1.5, -0.5, -0.5, -0.5]  # sqrt(3 / 3)
    assert group_advantages(rewards, normalize_by_std=True, std="population", eps=0) == pytest.approx(
        [3**0.5, *[-(3**-0.5)] * 3]  # sqrt(3 / 4)
    )


def test_eps_is_added_to_the_standard_deviation():
    assert group_advantages([1.0, -1.0], normalize_by_std=True, std="population", eps=0.25) == pytest.approx([0.8, -0.8])


@pytest.mark.parametrize("normalize_by_std", [True, False])
@pytest.mark.parametrize("rewards", [[1.0] * 4, [0.1] * 3, [-0.7], []])
def test_equal_rewards_give_exact_zeros(rewards, normalize_by_std):
    assert group_advantages(rewards, normalize_by_std=normalize_by_std, std="sample") == [0.0] * len(rewards)


@reproducible
@given(rewards_lists, st.sampled_from(["population", "sample"]))
def test_advantages_are_centred_and_have_unit_standard_deviation(rewards, std):
    assume(len(set(rewards)) > 1)
    advantages = group_advantages(rewards, normalize_by_std=True, std=std, eps=0)
    deviation = statistics.pstdev if std == "population" else statistics.stdev
    assert sum(advantages) == pytest.approx(0, abs=1e-9)
    assert deviation(advantages) == pytest.approx(1)


@reproducible
@given(rewards_lists, st.floats(-10, 10), st.floats(0.1, 10), st.booleans())
def test_advantages_ignore_a_shift_of_the_rewards_and_std_normalised_ones_their_scale(rewards, shift, scale, normalize_by_std):
    assume(len(set(rewards)) > 1)
    advantages = group_advantages(rewards, normalize_by_std=normalize_by_std, std="sample", eps=0)
    moved = [scale * reward + shift for reward in rewards]
    expected = advantages if normalize_by_std else [scale * advantage for advantage in advantages]
    assert group_advantages(moved, normalize_by_std=normalize_by_std, std="sample", eps=0) == pytest.approx(
        expected, rel=1e-6, abs=1e-9
    )


@reproducible
@given(rewards_lists, st.sampled_from([("population", 0), ("sample", 1)]))
def test_advantages_match_numpy(rewards, std_and_ddof):
    std, ddof = std_and_ddof
    array = np.array(rewards)
    expected = (array - array.mean()) / (array.std(ddof=ddof) + 1e-6)
    np.testing.assert_allclose(group_advantages(rewards, normalize_by_std=True, std=std), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_reward_that_is_not_finite_is_refused(bad):
    with pytest.raises(ValueError, match=r"must be finite, correct the reward function"):
        group_advantages([1.0, bad], normalize_by_std=True, std="sample")


# dynamic sampling


@pytest.mark.parametrize(("accuracy", "kept"), [(0.0, False), (1 / 16, True), (0.5, True), (15 / 16, True), (1.0, False)])
def test_only_groups_strictly_between_all_wrong_and_all_correct_are_kept(accuracy, kept):
    assert has_learning_signal(accuracy) is kept


# soft overlong punishment


@pytest.mark.parametrize(
    ("num_tokens", "punishment"),
    [
        (0, 0.0),
        (16383, 0.0),
        (16384, 0.0),  # L_max - L_cache
        (16385, -1 / 4096),
        (18432, -0.5),
        (20479, -4095 / 4096),
        (20480, -1.0),  # L_max
        (20481, -1.0),
        (10**6, -1.0),
    ],
)
def test_overlong_punishment_with_the_papers_lengths(num_tokens, punishment):
    assert soft_overlong_punishment(num_tokens, max_response_tokens=20480, cache_tokens=4096) == punishment


@reproducible
@given(st.integers(0, 500), st.integers(1, 200))
def test_overlong_punishment_is_off_without_a_cache(num_tokens, max_response_tokens):
    assert soft_overlong_punishment(num_tokens, max_response_tokens, 0) == 0.0


@reproducible
@given(st.data(), st.integers(1, 200))
def test_overlong_punishment_never_grows_with_length_and_stays_in_range(data, max_response_tokens):
    cache_tokens = data.draw(st.integers(1, max_response_tokens))
    curve = [soft_overlong_punishment(length, max_response_tokens, cache_tokens) for length in range(max_response_tokens + 3)]
    assert curve == sorted(curve, reverse=True)
    assert curve[0] == 0.0 and curve[max_response_tokens] == curve[-1] == -1.0


@pytest.mark.parametrize("cache_tokens", [-1, 101])
def test_overlong_cache_outside_the_response_is_refused(cache_tokens):
    with pytest.raises(ValueError, match=rf"overlong_cache_tokens \({cache_tokens}\) must be between 0 and max_response_tokens"):
        soft_overlong_punishment(10, 100, cache_tokens)


# aggregation

token_losses = st.lists(
    st.tuples(st.integers(0, 3), st.lists(st.floats(-5, 5), min_size=1, max_size=6)), min_size=1, max_size=10
)  # (group, token losses) of each sample


def weighted(aggregation: str, samples: list[tuple[int, list[float]]]) -> float:
    num_tokens = [len(losses) for _, losses in samples]
    weights = sample_loss_weights(aggregation, num_tokens, [group for group, _ in samples])
    return sum(weight * sum(losses) for weight, (_, losses) in zip(weights, samples, strict=True)) / sum(num_tokens)


def test_loss_weights_match_hand_computed_values():
    num_tokens, group_of = [1, 3, 4], [7, 7, 9]
    assert sample_loss_weights("token_mean", num_tokens, group_of) == [1, 1, 1]
    assert sample_loss_weights("prompt_mean", [1, 3, 12], group_of) == [2, 2, 16 / 24]
    assert sample_loss_weights("sample_mean", num_tokens, group_of) == [8 / 3, 8 / 9, 8 / 12]


@reproducible
@given(token_losses)
def test_token_mean_is_the_mean_over_all_tokens(samples):
    tokens = [loss for _, losses in samples for loss in losses]
    assert weighted("token_mean", samples) == pytest.approx(np.mean(tokens), abs=1e-9)


@reproducible
@given(token_losses)
def test_prompt_mean_is_the_mean_over_groups_of_the_mean_over_their_tokens(samples):
    by_group: dict[int, list[float]] = {}
    for group, losses in samples:
        by_group.setdefault(group, []).extend(losses)
    assert weighted("prompt_mean", samples) == pytest.approx(np.mean([np.mean(losses) for losses in by_group.values()]), abs=1e-9)


@reproducible
@given(token_losses)
def test_sample_mean_is_the_mean_over_samples_of_the_mean_over_their_tokens(samples):
    assert weighted("sample_mean", samples) == pytest.approx(np.mean([np.mean(losses) for _, losses in samples]), abs=1e-9)


@pytest.mark.parametrize("aggregation", ["token_mean", "prompt_mean", "sample_mean"])
def test_all_aggregations_agree_when_every_sample_and_group_has_the_same_size(aggregation):
    assert sample_loss_weights(aggregation, [5] * 4, [0, 0, 1, 1]) == [1.0] * 4
    assert sample_loss_weights(aggregation, [], []) == []


def test_sample_without_tokens_and_unknown_aggregation_are_refused():
    with pytest.raises(ValueError, match="leave out those without"):
        sample_loss_weights("token_mean", [3, 0], [0, 0])
    with pytest.raises(ValueError, match="'mean'; use token_mean, prompt_mean or sample_mean"):
        sample_loss_weights("mean", [3], [0])  # type: ignore[arg-type]


def test_everything_but_the_token_loss_imports_without_torch():
    code = "import sys, dapo_megatron.algo.train_batch, dapo_megatron.algo.dynamic_sampling; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "False"
