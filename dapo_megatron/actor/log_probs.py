"""LM head: log-probabilities and entropy of chosen tokens from hidden states, in token chunks, vocabulary-parallel.

Shape letters: R rows (tokens whose successor is trained on), H hidden, V vocabulary, V_tp vocabulary rows of this rank.
The fp32 logits of only `chunk_tokens` rows exist at a time. Those of the last chunk are kept for the backward, which recomputes the
others: nothing is computed twice where all rows fit into one chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

BLOCK_ELEMENTS = 2**21
"""Logits that elementwise work takes at a time, 8 MiB."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """This rank's part of the vocabulary: rows `start .. start + num_rows` of V, without padding rows.

    `group` is the tensor-parallel group, None when one rank holds all of V.
    """

    start: int
    num_rows: int
    group: dist.ProcessGroup | None


def log_probs_and_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    vocabulary: Vocabulary,
    temperature: float,
    chunk_tokens: int,
    reduce_hidden_grad: bool = True,
) -> tuple[Tensor, Tensor]:
    """log p(target) and entropy (nats), fp32 [R] each, of softmax(hidden @ weight.T / temperature); same on all TP ranks.

    hidden [R, H] and targets [R] (vocabulary ids) are the same on all ranks of the group, weight is [>= num_rows, H] (rows past
    `num_rows` are padding). The gradient of hidden is summed over the group unless `reduce_hidden_grad` is False (the caller's
    own backward does it); that of weight is local.
    """
    return _LogProbs.apply(hidden, weight, targets, vocabulary, temperature, chunk_tokens, reduce_hidden_grad)


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        vocabulary: Vocabulary,
        temperature: float,
        chunk_tokens: int,
        reduce_hidden_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        rows = hidden.shape[0]
        local_targets, owned = _local_targets(targets, vocabulary)
        stats = torch.zeros(4, rows, dtype=torch.float32, device=hidden.device)
        stats[0] = -torch.inf  # stays so on a rank that holds only padding rows
        logits = torch.empty(0)
        for chunk in _chunks(rows, chunk_tokens, vocabulary):
            del logits  # before the next ones: one chunk at a time
            logits = _logits(hidden[chunk], weight, vocabulary, temperature)
            stats[:, chunk] = _statistics(logits, local_targets[chunk], owned[chunk])
        maximum, total, weighted, target_logits = _over_ranks(stats, vocabulary.group)
        scale = (maximum - maximum.amax(dim=0)).exp_()
        total = (total * scale).sum(dim=0)
        log_normalizer = maximum.amax(dim=0) + total.log()
        entropy = log_normalizer - (weighted * scale).sum(dim=0) / total
        log_probs = target_logits.sum(dim=0) - log_normalizer
        ctx.save_for_backward(hidden, weight, local_targets, owned, log_normalizer, entropy)
        ctx.last_logits = logits if any(ctx.needs_input_grad) else None
        ctx.vocabulary, ctx.temperature, ctx.chunk_tokens = vocabulary, temperature, chunk_tokens
        ctx.reduce_hidden_grad = reduce_hidden_grad
        ctx.set_materialize_grads(False)
        return log_probs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, local_targets, owned, log_normalizer, entropy = ctx.saved_tensors
        vocabulary: Vocabulary = ctx.vocabulary
        grad_hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        local_weight = weight[: vocabulary.num_rows]
        logits, ctx.last_logits = ctx.last_logits, None
        for chunk in reversed(_chunks(hidden.shape[0], ctx.chunk_tokens, vocabulary)):
            if logits is None:
                logits = _logits(hidden[chunk], weight, vocabulary, ctx.temperature)
            grad_logits = _to_grad(
                logits,
                log_normalizer[chunk],
                entropy[chunk],
                local_targets[chunk],
                owned[chunk],
                *(None if grad is None else grad[chunk] / ctx.temperature for grad in grads),
            ).to(hidden.dtype)
            logits = None
            grad_hidden[chunk] = grad_logits @ local_weight
            if grad_weight.dtype == hidden.dtype:
                grad_weight[: vocabulary.num_rows].addmm_(grad_logits.t(), hidden[chunk])
            else:  # low-precision product, fp32 sum over chunks
                grad_weight[: vocabulary.num_rows].add_(grad_logits.t() @ hidden[chunk])
        if vocabulary.group is not None and ctx.reduce_hidden_grad:
            dist.all_reduce(grad_hidden, group=vocabulary.group)
        return grad_hidden.to(hidden.dtype), grad_weight.to(weight.dtype), None, None, None, None, None


def _chunks(rows: int, chunk_tokens: int, vocabulary: Vocabulary) -> list[slice]:
    """None on a rank that holds only padding rows: it has no logits."""
    if not vocabulary.num_rows:
        return []
    return [slice(start, min(start + chunk_tokens, rows)) for start in range(0, rows, chunk_tokens)]


def _local_targets(targets: Tensor, vocabulary: Vocabulary) -> tuple[Tensor, Tensor]:
    """Column of each target in this rank's logits (0 where another rank owns it) and 1.0 where this rank owns it."""
    local = targets - vocabulary.start
    owned = (local >= 0) & (local < vocabulary.num_rows)
    return torch.where(owned, local, 0), owned.float()


def _logits(hidden: Tensor, weight: Tensor, vocabulary: Vocabulary, temperature: float) -> Tensor:
    """fp32 [chunk, num_rows]."""
    logits = (hidden @ weight[: vocabulary.num_rows].t()).float()
    return logits if temperature == 1.0 else logits.div_(temperature)


def _statistics(logits: Tensor, local_targets: Tensor, owned: Tensor) -> Tensor:
    """Per row [4, rows]: maximum m, sum exp(l - m), sum exp(l - m) * l, and the target's logit where this rank owns it."""
    maximum = logits.amax(dim=-1)
    total, weighted = torch.empty_like(maximum), torch.empty_like(maximum)
    for block in _blocks(logits):
        exp = (logits[block] - maximum[block, None]).exp_()
        total[block] = exp.sum(dim=-1)
        weighted[block] = exp.mul_(logits[block]).sum(dim=-1)
    return torch.stack((maximum, total, weighted, logits.gather(1, local_targets[:, None]).squeeze(1) * owned))


def _to_grad(
    logits: Tensor,
    log_normalizer: Tensor,
    entropy: Tensor,
    local_targets: Tensor,
    owned: Tensor,
    grad_log_probs: Tensor | None,
    grad_entropy: Tensor | None,
) -> Tensor:
    """The gradient of the logits, in their place: dlogp/dl = onehot - p, dH/dl = -p * (log p + H)."""
    for block in _blocks(logits):
        log_p = logits[block].sub_(log_normalizer[block, None])
        factor = torch.zeros_like(log_normalizer[block, None]) if grad_log_probs is None else -grad_log_probs[block, None]
        if grad_entropy is None:
            log_p.exp_().mul_(factor)
        else:
            probabilities = log_p.exp()
            log_p.add_(entropy[block, None]).mul_(-grad_entropy[block, None]).add_(factor).mul_(probabilities)
    if grad_log_probs is not None:
        logits.scatter_add_(1, local_targets[:, None], (grad_log_probs * owned)[:, None])
    return logits


def _blocks(logits: Tensor) -> list[slice]:
    """Rows that stay in a CPU's cache from one elementwise operation to the next."""
    rows = max(1, BLOCK_ELEMENTS // logits.shape[1])
    return [slice(start, start + rows) for start in range(0, logits.shape[0], rows)]


def _over_ranks(stats: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, ...]:
    """[4, R] of every rank of the group, as four [ranks, R] tensors."""
    if group is None:
        return tuple(row[None] for row in stats)
    ranks = dist.get_world_size(group)
    gathered = torch.empty(ranks * stats.shape[0], stats.shape[1], dtype=stats.dtype, device=stats.device)
    dist.all_gather_into_tensor(gathered, stats, group=group)
    return tuple(gathered.view(ranks, *stats.shape).unbind(dim=1))
