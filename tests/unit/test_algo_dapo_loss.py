"""Value and gradient of the token loss: hand-computed cases, an fp64 oracle by cases, and extreme inputs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dapo_megatron.algo.dapo_loss import MAX_ABS_LOG_RATIO, TokenLoss, dapo_token_loss, k3_divergence

reproducible = settings(derandomize=True, deadline=None)

LOW, HIGH = 0.2, 0.28


def token_loss(ratios: list[float], advantages: list[float], dual_clip: float | None = None) -> tuple[TokenLoss, torch.Tensor]:
    """Loss of tokens with these ratios (old log-prob -1) and its gradient with respect to their log-probs, in fp64."""
    old = torch.full((len(ratios),), -1.0, dtype=torch.float64)
    log_probs = (old + torch.tensor(ratios, dtype=torch.float64).log()).requires_grad_()
    result = dapo_token_loss(
        log_probs,
        old,
        torch.tensor(advantages, dtype=torch.float64),
        clip_ratio_low=LOW,
        clip_ratio_high=HIGH,
        dual_clip=dual_clip,
    )
    (gradient,) = torch.autograd.grad(result.loss.sum(), log_probs)
    return result, gradient


def oracle(ratio: float, advantage: float, dual_clip: float | None) -> float:
    """The same loss by cases of the advantage's sign instead of minima over clipped products."""
    if advantage >= 0:
        return -advantage * min(ratio, 1 + HIGH)
    effective = max(ratio, 1 - LOW)
    if dual_clip is not None:
        effective = min(effective, dual_clip)
    return -advantage * effective


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        (1.0, 2.0, -2.0, -2.0, None),
        (1.2, 2.0, -2.4, -2.4, None),
        (1.5, 2.0, -2.56, 0.0, "high"),  # 1.28 * 2
        (0.5, 2.0, -1.0, -1.0, None),  # a good token that became less likely is pulled back without a bound
        (1.0, -2.0, 2.0, 2.0, None),
        (0.9, -2.0, 1.8, 1.8, None),
        (0.5, -2.0, 1.6, 0.0, "low"),  # 0.8 * 2
        (1.5, -2.0, 3.0, 3.0, None),  # a bad token that became more likely is pushed down without a bound
        (1.5, 0.0, 0.0, 0.0, None),
        (0.5, 0.0, 0.0, 0.0, None),
    ],
)
def test_loss_gradient_and_clip_flags_match_hand_computed_cases(ratio, advantage, loss, gradient, clipped):
    result, got_gradient = token_loss([ratio], [advantage])
    assert result.loss.item() == pytest.approx(loss, abs=1e-12)
    assert got_gradient.item() == pytest.approx(gradient, abs=1e-12)
    assert result.ratio.item() == pytest.approx(ratio)
    assert (result.clipped_low.item(), result.clipped_high.item(), result.clipped_dual.item()) == (
        clipped == "low",
        clipped == "high",
        False,
    )


def test_clip_bounds_themselves_are_not_counted_as_clipped_and_keep_their_gradient():
    result, gradient = token_loss([1 + HIGH - 1e-9, 1 - LOW + 1e-9], [1.0, -1.0])
    assert not result.clipped_high.any() and not result.clipped_low.any()
    torch.testing.assert_close(gradient, torch.tensor([-1.28, 0.8], dtype=torch.float64))


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        (4.0, -2.0, 6.0, 0.0, True),  # bounded at 3 * 2
        (2.5, -2.0, 5.0, 5.0, False),
        (0.5, -2.0, 1.6, 0.0, False),  # the lower clip is not touched
        (4.0, 2.0, -2.56, 0.0, False),  # positive advantages are not touched
    ],
)
def test_dual_clip_bounds_the_loss_of_negative_advantages(ratio, advantage, loss, gradient, clipped):
    result, got_gradient = token_loss([ratio], [advantage], dual_clip=3.0)
    assert result.loss.item() == pytest.approx(loss)
    assert got_gradient.item() == pytest.approx(gradient)
    assert result.clipped_dual.item() is clipped


def far_from_kinks(ratio: float) -> bool:
    return all(abs(math.log(ratio / kink)) > 1e-4 for kink in (1 - LOW, 1 + HIGH, 3.0))


@reproducible
@given(
    st.lists(
        st.tuples(st.floats(0.02, 50.0).filter(far_from_kinks), st.floats(-5, 5).map(lambda value: round(value, 3))),
        min_size=1,
        max_size=20,
    ),
    st.sampled_from([None, 3.0]),
)
def test_value_and_gradient_match_fp64_oracle_and_its_finite_differences(tokens, dual_clip):
    ratios, advantages = [list(column) for column in zip(*tokens, strict=True)]
    result, gradient = token_loss(ratios, advantages, dual_clip)
    expected = [oracle(ratio, advantage, dual_clip) for ratio, advantage in tokens]
    np.testing.assert_allclose(result.loss.detach().numpy(), expected, rtol=1e-12, atol=1e-12)
    step = 1e-6
    differences = [
        (oracle(ratio * math.exp(step), advantage, dual_clip) - oracle(ratio * math.exp(-step), advantage, dual_clip))
        / (2 * step)
        for ratio, advantage in tokens
    ]
    np.testing.assert_allclose(gradient.numpy(), differences, rtol=1e-6, atol=1e-6)


def test_gradient_at_the_sampling_policy_is_minus_the_advantage():
    advantages = [1.5, -0.5, 0.0]
    _, gradient = token_loss([1.0, 1.0, 1.0], advantages)
    torch.testing.assert_close(gradient, -torch.tensor(advantages, dtype=torch.float64))


def test_extreme_log_ratios_give_finite_fp32_losses_and_no_gradient():
    log_probs = torch.tensor([0.0, 0.0, 0.0, -1e4, -1e4, -1e4, -torch.inf], requires_grad=True)
    old_log_probs = torch.tensor([-1e4, -1e4, -1e4, 0.0, 0.0, 0.0, 0.0])
    advantages = torch.tensor([1.0, 0.0, -1.0, 1.0, 0.0, -1.0, 1.0])
    result = dapo_token_loss(log_probs, old_log_probs, advantages, clip_ratio_low=LOW, clip_ratio_high=HIGH)
    result.loss.sum().backward()
    bound = math.exp(MAX_ABS_LOG_RATIO)
    expected = torch.tensor([-1.28, 0.0, bound, -1 / bound, 0.0, 0.8, -1 / bound])
    torch.testing.assert_close(result.loss.detach(), expected)
    assert log_probs.grad is not None
    torch.testing.assert_close(log_probs.grad, torch.zeros(7))


def test_nan_log_prob_is_not_hidden():
    result = dapo_token_loss(torch.tensor([torch.nan]), torch.zeros(1), torch.ones(1), clip_ratio_low=LOW, clip_ratio_high=HIGH)
    assert result.loss.isnan().all()


def test_only_log_probs_are_differentiated():
    log_probs, old_log_probs, advantages = (torch.full((2,), value, requires_grad=True) for value in (-1.0, -1.1, 0.5))
    result = dapo_token_loss(log_probs, old_log_probs, advantages, clip_ratio_low=LOW, clip_ratio_high=HIGH)
    result.loss.sum().backward()
    assert log_probs.grad is not None and old_log_probs.grad is None and advantages.grad is None
    assert result.loss.requires_grad and not result.ratio.requires_grad


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(ValueError, match=r"'old_log_probs': \(4, 1\).*must be the same \[T\]"):
        dapo_token_loss(torch.zeros(4), torch.zeros(4, 1), torch.zeros(4), clip_ratio_low=LOW, clip_ratio_high=HIGH)


def test_no_tokens_give_an_empty_loss_with_a_gradient():
    log_probs = torch.zeros(0, requires_grad=True)
    result = dapo_token_loss(log_probs, torch.zeros(0), torch.zeros(0), clip_ratio_low=LOW, clip_ratio_high=HIGH, dual_clip=3.0)
    result.loss.sum().backward()
    assert log_probs.grad is not None and log_probs.grad.shape == (0,)


def corrected_loss(weights: list[float], ratios: list[float], advantages: list[float], tis_clip: float | None):
    """As `token_loss`, for tokens whose old policy is `weights` times as likely as the one that drew them."""
    old = torch.full((len(ratios),), -1.0, dtype=torch.float64, requires_grad=True)
    drawn = (old.detach() - torch.tensor(weights, dtype=torch.float64).log()).requires_grad_()
    log_probs = (old.detach() + torch.tensor(ratios, dtype=torch.float64).log()).requires_grad_()
    result = dapo_token_loss(
        log_probs,
        old,
        torch.tensor(advantages, dtype=torch.float64),
        clip_ratio_low=LOW,
        clip_ratio_high=HIGH,
        rollout_log_probs=drawn,
        tis_clip=tis_clip,
    )
    result.loss.sum().backward()
    assert old.grad is None and drawn.grad is None, "the weight is a constant"
    return result, log_probs.grad


@pytest.mark.parametrize(
    ("weight", "used", "truncated"),
    [(0.25, 0.25, False), (1.0, 1.0, False), (1.9, 1.9, False), (3.0, 2.0, True), (1e9, 2.0, True)],
)
@pytest.mark.parametrize("ratio", [0.5, 1.0, 1.5])
def test_importance_weight_scales_loss_and_gradient_up_to_its_bound(weight, used, truncated, ratio):
    plain, gradient = token_loss([ratio, ratio], [2.0, -2.0])
    result, got_gradient = corrected_loss([weight, weight], [ratio, ratio], [2.0, -2.0], tis_clip=2.0)
    torch.testing.assert_close(result.loss, used * plain.loss)
    torch.testing.assert_close(got_gradient, used * gradient)
    assert result.truncated.tolist() == [truncated, truncated]
    assert torch.equal(result.clipped_high, plain.clipped_high) and torch.equal(result.clipped_low, plain.clipped_low)


def test_expected_gradient_under_the_drawing_policy_is_that_of_the_old_one():
    """Over a vocabulary of 4, exactly: sum over tokens of q * (p_old / q) * grad = sum of p_old * grad, while no weight is cut."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, generator=generator, dtype=torch.float64)
    drawn = torch.randn(4, generator=generator, dtype=torch.float64).log_softmax(0)
    advantages = torch.tensor([1.0, -0.5, 0.25, -1.0], dtype=torch.float64)

    def gradient(of_tokens: torch.Tensor, tis_clip: float | None) -> torch.Tensor:
        theta = logits.clone().requires_grad_()
        log_probs = theta.log_softmax(0)
        result = dapo_token_loss(
            *(log_probs, log_probs.detach(), advantages),
            clip_ratio_low=LOW,
            clip_ratio_high=HIGH,
            rollout_log_probs=drawn,
            tis_clip=tis_clip,
        )
        (of_tokens.exp() * result.loss).sum().backward()
        return theta.grad

    on_policy = gradient(logits.log_softmax(0), None)
    torch.testing.assert_close(gradient(drawn, 1e6), on_policy)
    assert (gradient(drawn, None) - on_policy).abs().max() > 0.01


def test_a_weight_without_the_log_probs_that_drew_is_refused():
    with pytest.raises(ValueError, match=r"tis_clip \(2\) needs rollout_log_probs"):
        dapo_token_loss(*[torch.zeros(2)] * 3, clip_ratio_low=LOW, clip_ratio_high=HIGH, tis_clip=2.0)


def test_k3_is_the_divergence_in_the_mean_and_never_negative():
    generator = torch.Generator().manual_seed(1)
    p, q = (torch.randn(6, generator=generator, dtype=torch.float64).log_softmax(0) for _ in range(2))
    estimates = k3_divergence(p, q)
    assert (estimates >= 0).all()
    torch.testing.assert_close((q.exp() * estimates).sum(), (q.exp() * (q - p)).sum())
