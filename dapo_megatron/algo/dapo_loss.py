"""The DAPO policy loss of one token (arXiv 2503.14476, eq. 8). How tokens are averaged is `aggregation.py`.

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


def dapo_token_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    *,
    clip_ratio_low: float,
    clip_ratio_high: float,
    dual_clip: float | None = None,
) -> TokenLoss:
    """Clip-higher surrogate of each token: -min(r A, clip(r, 1 - clip_ratio_low, 1 + clip_ratio_high) A), the summand of eq. 8.

    `log_probs`, `old_log_probs` (nats) and `advantages` are [T] of one floating dtype, fp32 or wider; only `log_probs` is
    differentiated. Nothing is summed here: every token is independent, so any cut of T gives the same values.

    `dual_clip` c > 1 keeps the objective of a negative advantage at or above c A (arXiv 1912.09729, eq. 5).

    |log r| is clamped to `MAX_ABS_LOG_RATIO`; a token beyond it gets a finite loss and no gradient. A NaN in any input
    stays NaN. Unequal shapes raise ValueError, they would broadcast.
    """
    if not log_probs.shape == old_log_probs.shape == advantages.shape:
        shapes = [tuple(tensor.shape) for tensor in (log_probs, old_log_probs, advantages)]
        raise ValueError(f"log_probs, old_log_probs and advantages have shapes {shapes}; all must be the same [T]")
    advantages = advantages.detach()
    log_ratio = (log_probs - old_log_probs.detach()).clamp(-MAX_ABS_LOG_RATIO, MAX_ABS_LOG_RATIO)
    ratio = log_ratio.exp()
    clipped_ratio = ratio.clamp(1 - clip_ratio_low, 1 + clip_ratio_high)
    objective = torch.minimum(ratio * advantages, clipped_ratio * advantages)

    ratio, negative = ratio.detach(), advantages < 0
    clipped_dual = torch.zeros_like(negative)
    if dual_clip is not None:
        objective = torch.where(negative, torch.maximum(objective, dual_clip * advantages), objective)
        clipped_dual = negative & (ratio > dual_clip)
    return TokenLoss(
        loss=-objective,
        ratio=ratio,
        clipped_low=negative & (ratio < 1 - clip_ratio_low),
        clipped_high=(advantages > 0) & (ratio > 1 + clip_ratio_high),
        clipped_dual=clipped_dual,
    )
