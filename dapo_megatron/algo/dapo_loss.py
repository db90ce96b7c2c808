"""The DAPO policy loss of one token (arXiv 2503.14476, eq. 8), with truncated importance sampling for tokens that other weights or
another implementation drew. How tokens are averaged is `aggregation.py`.

Shapes: T packed tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_ABS_LOG_RATIO = 20.0
"""Bound of |log r|. exp(20) = 4.9e8 stays finite, so a zero advantage times the ratio is 0 and not NaN."""


@dataclass(frozen=True, slots=True, eq=False)
class TokenLoss:
    """Loss of T tokens and how the surrogate arrived at it; everything but `loss` is detached."""

    loss: Tensor
    """[T], negative surrogate objective, differentiable in `log_probs`."""
    ratio: Tensor
    """[T], r = pi_theta / pi_old."""
    clipped_low: Tensor
    """[T] bool: r < 1 - clip_ratio_low and A < 0, the minimum took the clipped term."""
    clipped_high: Tensor
    """[T] bool: r > 1 + clip_ratio_high and A > 0, the minimum took the clipped term."""
    clipped_dual: Tensor
    """[T] bool: r > dual_clip and A < 0, the bound dual_clip * A took effect. All False without dual clip."""
    truncated: Tensor
    """[T] bool: pi_old / pi_rollout > tis_clip, the weight is tis_clip. All False without truncated importance sampling."""


def dapo_token_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    *,
    clip_ratio_low: float,
    clip_ratio_high: float,
    dual_clip: float | None = None,
    rollout_log_probs: Tensor | None = None,
    tis_clip: float | None = None,
) -> TokenLoss:
    """Clip-higher surrogate of each token: -min(r A, clip(r, 1 - clip_ratio_low, 1 + clip_ratio_high) A), the summand of eq. 8.

    `log_probs`, `old_log_probs` (nats) and `advantages` are [T] of one floating dtype, fp32 or wider; only `log_probs` is
    differentiated. Nothing is summed here: every token is independent, so any cut of T gives the same values.

    `dual_clip` c > 1 keeps the objective of a negative advantage at or above c A (arXiv 1912.09729, eq. 5).

    `tis_clip` C with `rollout_log_probs` [T] (nats, of the policy that drew the tokens, as the engine reported them) weights each token:

        -min(pi_old / pi_rollout, C) * min(r A, clip(r, 1 - clip_ratio_low, 1 + clip_ratio_high) A),   r = pi_theta / pi_old

    The clip keeps pi_theta near pi_old, the actor at the start of the rollout step (the proximal policy of arXiv 2110.00641, eq. 8); the
    weight, which is not differentiated, corrects for the tokens being pi_rollout's. Truncation (Ionides 2008, "Truncated Importance
    Sampling") trades a bias for a bounded variance; between trainer and engine: Yao et al. 2025, "Your Efficient RL
    Framework Secretly Brings You Off-Policy RL Training". Without `tis_clip` nothing is multiplied.

    |log r| is clamped to `MAX_ABS_LOG_RATIO`, and so is that of the weight; a token beyond it gets a finite loss and no gradient. A NaN in
    any input stays NaN. Unequal shapes raise ValueError, they would broadcast.
    """
    inputs = {"log_probs": log_probs, "old_log_probs": old_log_probs, "advantages": advantages}
    if tis_clip is not None:
        if rollout_log_probs is None:
            raise ValueError(f"tis_clip ({tis_clip:g}) needs rollout_log_probs; give the log-probs that the engine reported")
        inputs["rollout_log_probs"] = rollout_log_probs
    if len({tensor.shape for tensor in inputs.values()}) > 1:
        shapes = {name: tuple(tensor.shape) for name, tensor in inputs.items()}
        raise ValueError(f"the inputs have shapes {shapes}; all must be the same [T]")
    advantages = advantages.detach()
    ratio = clamped_log_ratio(log_probs, old_log_probs.detach()).exp()
    clipped_ratio = ratio.clamp(1 - clip_ratio_low, 1 + clip_ratio_high)
    objective = torch.minimum(ratio * advantages, clipped_ratio * advantages)

    ratio, negative = ratio.detach(), advantages < 0
    clipped_dual = torch.zeros_like(negative)
    if dual_clip is not None:
        objective = torch.where(negative, torch.maximum(objective, dual_clip * advantages), objective)
        clipped_dual = negative & (ratio > dual_clip)
    truncated = torch.zeros_like(negative)
    if tis_clip is not None and rollout_log_probs is not None:
        weight = clamped_log_ratio(old_log_probs.detach(), rollout_log_probs.detach()).exp()
        objective, truncated = objective * weight.clamp(max=tis_clip), weight > tis_clip
    return TokenLoss(
        loss=-objective,
        ratio=ratio,
        clipped_low=negative & (ratio < 1 - clip_ratio_low),
        clipped_high=(advantages > 0) & (ratio > 1 + clip_ratio_high),
        clipped_dual=clipped_dual,
        truncated=truncated,
    )


def clamped_log_ratio(log_probs: Tensor, of_log_probs: Tensor) -> Tensor:
    """log (p / q) of [T] tokens, kept within `MAX_ABS_LOG_RATIO`."""
    return (log_probs - of_log_probs).clamp(-MAX_ABS_LOG_RATIO, MAX_ABS_LOG_RATIO)


def k3_divergence(log_probs: Tensor, drawn_log_probs: Tensor) -> Tensor:
    """Estimate of KL(q || p) from each of [T] tokens drawn from q: p/q - 1 - log(p/q), never negative, unbiased where p/q is bounded.

    `log_probs` are p's and `drawn_log_probs` q's, in nats. Schulman 2020, "Approximating KL Divergence", estimator k3.
    """
    log_ratio = clamped_log_ratio(log_probs, drawn_log_probs)
    return log_ratio.expm1() - log_ratio
