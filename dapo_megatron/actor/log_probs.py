"""LM head: log-probabilities and entropy of chosen tokens from hidden states, in token chunks, vocabulary-parallel.

Shape letters: R rows (tokens whose successor is trained on), H hidden, V vocabulary, V_tp vocabulary rows of this rank.
The fp32 logits of only `chunk_tokens` rows exist at a time, forward and backward; the backward recomputes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


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
        # Per row: local maximum m, sum exp(l - m), sum exp(l - m) * l, and the target's logit where this rank owns it.
        stats = torch.zeros(4, rows, dtype=torch.float32, device=hidden.device)
        stats[0] = -torch.inf  # stays so on a rank that holds only padding rows
        for chunk in _chunks(rows, chunk_tokens, vocabulary):
            logits = _logits(hidden[chunk], weight, vocabulary, temperature)
            maximum = logits.amax(dim=-1)
            stats[3, chunk] = logits.gather(1, local_targets[chunk, None]).squeeze(1) * owned[chunk]
            exp = (logits - maximum[:, None]).exp_()
            stats[0, chunk] = maximum
            stats[1, chunk] = exp.sum(dim=-1)
            stats[2, chunk] = exp.mul_(logits).sum(dim=-1)
        maximum, total, weighted, target_logits = _over_ranks(stats, vocabulary.group)
        scale = (maximum - maximum.amax(dim=0)).exp_()
        total = (total * scale).sum(dim=0)
        log_normalizer = maximum.amax(dim=0) + total.log()
        entropy = log_normalizer - (weighted * scale).sum(dim=0) / total
        log_probs = target_logits.sum(dim=0) - log_normalizer
        ctx.save_for_backward(hidden, weight, local_targets, owned, log_normalizer, entropy)
        ctx.vocabulary, ctx.temperature, ctx.chunk_tokens = vocabulary, temperature, chunk_tokens
        ctx.reduce_hidden_grad = reduce_hidden_grad
        ctx.set_materialize_grads(False)
        return log_probs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_log_probs, grad_entropy = grads
        hidden, weight, local_targets, owned, log_normalizer, entropy = ctx.saved_tensors
        vocabulary: Vocabulary = ctx.vocabulary
        grad_hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        local_weight = weight[: vocabulary.num_rows]
        for chunk in _chunks(hidden.shape[0], ctx.chunk_tokens, vocabulary):
            log_p = _logits(hidden[chunk], weight, vocabulary, ctx.temperature).sub_(log_normalizer[chunk, None])
            probabilities = log_p.exp()
            if grad_entropy is not None:  # dH/dl = -p * (log p + H)
                log_p.add_(entropy[chunk, None]).mul_(probabilities).mul_(-grad_entropy[chunk, None])
            else:
                log_p.zero_()
            if grad_log_probs is not None:  # dlogp/dl = onehot - p
                log_p.addcmul_(probabilities, grad_log_probs[chunk, None], value=-1)
                log_p.scatter_add_(1, local_targets[chunk, None], (grad_log_probs[chunk] * owned[chunk])[:, None])
            grad_logits = log_p.div_(ctx.temperature).to(hidden.dtype)
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
    return (hidden @ weight[: vocabulary.num_rows].t()).float().div_(temperature)


def _over_ranks(stats: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, ...]:
    """[4, R] of every rank of the group, as four [ranks, R] tensors."""
    if group is None:
        return tuple(row[None] for row in stats)
    ranks = dist.get_world_size(group)
    gathered = torch.empty(ranks * stats.shape[0], stats.shape[1], dtype=stats.dtype, device=stats.device)
    dist.all_gather_into_tensor(gathered, stats, group=group)
    return tuple(gathered.view(ranks, *stats.shape).unbind(dim=1))
