"""Drawing tokens from logits by inversion of the cumulative distribution.

Shape letters: B rows, V vocabulary, G samples of a request, T response tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_DRAWS_PER_BLOCK = 64


@dataclass(frozen=True, slots=True)
class RowParams:
    """Sampling parameters of B rows. None stands for "no row asks for it", which lets `draw` take its short path."""

    temperature: Tensor
    """[B, 1] fp32, positive; 1 where the row is greedy."""
    greedy: Tensor | None
    """[B] bool."""
    top_k: Tensor | None
    """[B, 1] int64; V or more keeps all."""
    top_p: Tensor | None
    """[B, 1] fp32 in (0, 1]."""

    @staticmethod
    def of(temperature: np.ndarray, top_k: np.ndarray, top_p: np.ndarray, device: torch.device) -> RowParams:
        """From one number per row: `temperature` 0 is greedy, `top_k` 0 and `top_p` 1 keep everything."""

        def column(values: np.ndarray, dtype: torch.dtype) -> Tensor:
            return torch.as_tensor(values[:, None], dtype=dtype, device=device)

        greedy = temperature == 0
        return RowParams(
            temperature=column(np.where(greedy, 1.0, temperature), torch.float32),
            greedy=torch.as_tensor(greedy, device=device) if greedy.any() else None,
            top_k=column(np.where(top_k == 0, np.iinfo(np.int64).max, top_k), torch.int64) if top_k.any() else None,
            top_p=column(top_p, torch.float32) if (top_p < 1).any() else None,
        )


def uniforms(seed: int, num_samples: int, num_tokens: int) -> np.ndarray:
    """Random numbers [G, T] fp64 in [0, 1): element (i, t) depends on (seed, i, t) only, not on G or T.

    Philox4x64 with `seed` as key; block c of 64 tokens starts at counter c * 2**64, so blocks never overlap.
    """
    blocks = [
        np.random.Generator(np.random.Philox(key=seed, counter=(0, block, 0, 0))).random((num_samples, _DRAWS_PER_BLOCK))
        for block in range(-(-num_tokens // _DRAWS_PER_BLOCK))
    ]
    return np.concatenate(blocks, axis=1)[:, :num_tokens]


def draw(logits: Tensor, u: Tensor, params: RowParams) -> tuple[Tensor, Tensor]:
    """One token per row.

    logits: [B, V], any float dtype; u: [B] fp64 in [0, 1). Returns token ids [B] int64 and their log-probabilities [B] fp32
    (nats) under the distribution drawn from, i.e. after temperature, top-k and top-p; 0 for greedy rows, whose distribution is
    a point. A token of probability zero is never drawn. NaN logits give a NaN log-probability.
    """
    scaled = logits.float() / params.temperature
    probs = scaled.softmax(-1) if params.top_k is None and params.top_p is None else _truncated(scaled, params)
    drawn = _invert(probs, u)
    tokens, log_probs = drawn[:, 0], probs.gather(1, drawn)[:, 0].log()
    if params.greedy is not None:
        tokens = torch.where(params.greedy, logits.argmax(-1), tokens)
        log_probs = torch.where(params.greedy, log_probs * 0, log_probs)  # a product, so that NaN stays NaN
    return tokens, log_probs


def _truncated(scaled: Tensor, params: RowParams) -> Tensor:
    """Probabilities [B, V] after top-k and top-p.

    Equal logits are ordered by token id, so exactly k tokens survive top-k. The nucleus is the smallest head whose mass reaches
    top_p; the most likely token always survives.
    """
    scaled, order = scaled.sort(dim=-1, descending=True, stable=True)
    if params.top_k is not None:
        rank = torch.arange(scaled.shape[-1], device=scaled.device)
        scaled = scaled.masked_fill(rank >= params.top_k, -torch.inf)
    probs = scaled.softmax(-1)
    if params.top_p is not None:
        mass_before = probs.cumsum(-1) - probs
        # "top_p 1" must keep the tail that rounding puts at a mass of 1 or more.
        probs = probs.masked_fill((mass_before >= params.top_p) & (params.top_p < 1), 0.0)
        probs = probs / probs.sum(-1, keepdim=True)
    return torch.zeros_like(probs).scatter_(1, order, probs)


def _invert(probs: Tensor, u: Tensor) -> Tensor:
    """First token [B, 1] whose cumulative probability exceeds u * total: the interval of a zero probability is empty."""
    # On CPU cumsum adds fp32 in fp64 and rounds once, so it never falls; a parallel scan has no such promise in fp32.
    cumulative = probs.cumsum(-1, dtype=torch.float32 if probs.device.type == "cpu" else torch.float64)
    total = cumulative[:, -1:]
    target = torch.minimum((u[:, None] * total).to(total.dtype), torch.nextafter(total, torch.zeros_like(total)))
    tokens = torch.searchsorted(cumulative, target, right=True)
    return tokens.clamp_(max=probs.shape[-1] - 1)  # only NaN rows find nothing
