"""LM head: log-probabilities and entropy of chosen tokens from hidden states, in token chunks, vocabulary-parallel.

Shape letters: R rows (tokens whose successor is trained on), H hidden, V vocabulary, V_tp vocabulary rows of this rank.
The fp32 logits of only `chunk_tokens` rows exist at a time, and they are computed once: `head_loss` takes the gradient of a chunk's
loss while its logits are there, in the forward pass; the backward pass scales it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

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


class ChunkLoss(Protocol):
    """The loss of some rows as a function of their log-probs."""

    def __call__(self, log_probs: Tensor, entropy: Tensor, rows: slice) -> Tensor:
        """Sum over the rows, differentiable in `log_probs` and `entropy` (fp32, nats)."""


def log_probs_and_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, vocabulary: Vocabulary, temperature: float, chunk_tokens: int
) -> tuple[Tensor, Tensor]:
    """log p(target) and entropy (nats), fp32 [R] each, of softmax(hidden @ weight.T / temperature); same on all TP ranks.

    hidden [R, H] and targets [R] (vocabulary ids) are the same on all ranks of the group, weight is [>= num_rows, H] (rows past
    `num_rows` are padding). No gradient flows.
    """
    with torch.no_grad():
        log_probs = torch.zeros(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        entropy = torch.zeros_like(log_probs)
        for chunk in _chunks(hidden, weight, targets, vocabulary, temperature, chunk_tokens):
            log_probs[chunk.rows], entropy[chunk.rows] = chunk.log_probs, chunk.entropy
            chunk.drop_logits()
    return log_probs, entropy


def head_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    loss: ChunkLoss,
    *,
    vocabulary: Vocabulary,
    temperature: float,
    chunk_tokens: int,
    reduce_hidden_grad: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum of `loss` over all rows, log-probs [R], entropy [R]); gradients of hidden and weight flow from the sum alone.

    Arguments as in `log_probs_and_entropy`. The gradient of hidden is summed over the group unless `reduce_hidden_grad` is False
    (the caller's own backward does it); that of weight is local.
    """
    return _HeadLoss.apply(
        hidden, weight, targets, loss, vocabulary, temperature, chunk_tokens, reduce_hidden_grad, torch.is_grad_enabled()
    )


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        loss: ChunkLoss,
        vocabulary: Vocabulary,
        temperature: float,
        chunk_tokens: int,
        reduce_hidden_grad: bool,
        with_grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        log_probs = torch.zeros(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        entropy = torch.zeros_like(log_probs)
        loss_sum = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.zeros(hidden.shape if with_grad else 0, dtype=torch.float32, device=hidden.device)
        grad_weight = torch.empty(weight.shape if with_grad else 0, dtype=torch.float32, device=weight.device)
        grad_weight[vocabulary.num_rows if hidden.shape[0] else 0 :].zero_()
        local_weight = weight[: vocabulary.num_rows]
        for chunk in _chunks(hidden, weight, targets, vocabulary, temperature, chunk_tokens):
            log_probs[chunk.rows], entropy[chunk.rows] = chunk.log_probs, chunk.entropy
            chunk_loss, grads = _loss_and_grads(loss, chunk, with_grad)
            loss_sum += chunk_loss
            if with_grad:
                grad_logits = chunk.to_grad(*(None if grad is None else grad / temperature for grad in grads)).to(hidden.dtype)
                grad_hidden[chunk.rows] = grad_logits @ local_weight
                _add_product(grad_weight[: vocabulary.num_rows], grad_logits.t(), hidden[chunk.rows], first=chunk.rows.start == 0)
                del grad_logits
            chunk.drop_logits()
        ctx.grads = (grad_hidden, grad_weight, hidden.dtype, weight.dtype)
        ctx.group = vocabulary.group if reduce_hidden_grad else None
        ctx.mark_non_differentiable(log_probs, entropy)
        ctx.set_materialize_grads(False)
        return loss_sum, log_probs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        scale = grads[0]
        assert scale is not None, "only the sum has a gradient"
        grad_hidden, grad_weight, hidden_dtype, weight_dtype = ctx.grads
        ctx.grads = None
        if scale.is_cuda or scale != 1:  # a comparison on CUDA would wait for the device
            grad_hidden.mul_(scale)
            grad_weight.mul_(scale)
        if ctx.group is not None:
            dist.all_reduce(grad_hidden, group=ctx.group)
        return grad_hidden.to(hidden_dtype), grad_weight.to(weight_dtype), *(None,) * 7


def _add_product(total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """total += a @ b, in fp32; the first product is written over what `total` held."""
    if a.dtype == torch.float32:
        total.addmm_(a, b, beta=0 if first else 1)
    elif first:
        total.copy_(a @ b)
    else:  # low-precision product, fp32 sum over chunks
        total.add_(a @ b)


def _loss_and_grads(loss: ChunkLoss, chunk: _Chunk, with_grad: bool) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The chunk's loss, and its gradients by log-probs and entropy; None where it does not depend on one."""
    if not with_grad:
        return loss(chunk.log_probs, chunk.entropy, chunk.rows), ()
    with torch.enable_grad():
        inputs = (chunk.log_probs.detach().requires_grad_(), chunk.entropy.detach().requires_grad_())
        value = loss(*inputs, chunk.rows)
        return value.detach(), torch.autograd.grad(value, inputs, allow_unused=True)


@dataclass(slots=True)
class _Chunk:
    """Some rows and exp(logits - maximum) of them, fp32 [n, num_rows of this rank], which `to_grad` overwrites.

    `shift` [n] is maximum - log_normalizer: with it an exponential becomes a probability.
    """

    rows: slice
    exponentials: Tensor | None
    local_targets: Tensor
    owned: Tensor
    shift: Tensor
    log_probs: Tensor
    entropy: Tensor

    def drop_logits(self) -> None:
        """Free them before the next chunk's are made."""
        self.exponentials = None

    def to_grad(self, grad_log_probs: Tensor | None, grad_entropy: Tensor | None) -> Tensor:
        """The gradient of the logits, in place of the exponentials: dlogp/dl = onehot - p, dH/dl = -p * (log p + H)."""
        assert self.exponentials is not None
        grad = self.exponentials
        scale = self.shift.exp()
        factor = torch.zeros_like(scale) if grad_log_probs is None else -grad_log_probs
        for block in _blocks(grad):
            if grad_entropy is None:
                grad[block].mul_((factor * scale)[block, None])
                continue
            of_entropy = -grad_entropy[block]
            plain = (factor[block] + of_entropy * (self.shift + self.entropy)[block]) * scale[block]
            with_log = torch.xlogy(grad[block], grad[block])
            grad[block].mul_(plain[:, None]).addcmul_(with_log, (of_entropy * scale[block])[:, None])
        if grad_log_probs is not None and grad.shape[1]:
            grad.scatter_add_(1, self.local_targets[:, None], (grad_log_probs * self.owned)[:, None])
        return grad


def _chunks(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocabulary: Vocabulary, temperature: float, chunk_tokens: int
) -> Iterator[_Chunk]:
    """One after the other; a collective over the group for each, also on a rank that holds only padding rows."""
    local_targets, owned = _local_targets(targets, vocabulary)
    for start in range(0, hidden.shape[0], chunk_tokens):
        rows = slice(start, start + chunk_tokens)
        logits = _logits(hidden[rows], weight, vocabulary, temperature)
        local = _exponentials_(logits, local_targets[rows], owned[rows])
        maximum, total, weighted, target_logits = _over_ranks(local, vocabulary.group)
        scale = (maximum - maximum.amax(dim=0)).exp_()
        total = (total * scale).sum(dim=0)
        log_normalizer = maximum.amax(dim=0) + total.log()
        entropy = log_normalizer - (weighted * scale).sum(dim=0) / total
        log_probs = target_logits.sum(dim=0) - log_normalizer
        chunk = _Chunk(rows, logits, local_targets[rows], owned[rows], local[0] - log_normalizer, log_probs, entropy)
        del logits
        yield chunk


def _local_targets(targets: Tensor, vocabulary: Vocabulary) -> tuple[Tensor, Tensor]:
    """Column of each target in this rank's logits (0 where another rank owns it) and 1.0 where this rank owns it."""
    local = targets - vocabulary.start
    owned = (local >= 0) & (local < vocabulary.num_rows)
    return torch.where(owned, local, 0), owned.float()


def _logits(hidden: Tensor, weight: Tensor, vocabulary: Vocabulary, temperature: float) -> Tensor:
    """fp32 [chunk, num_rows]."""
    logits = (hidden @ weight[: vocabulary.num_rows].t()).float()
    return logits if temperature == 1.0 else logits.div_(temperature)


def _exponentials_(logits: Tensor, local_targets: Tensor, owned: Tensor) -> Tensor:
    """Per row [4, rows]: maximum m, sum exp(l - m), sum exp(l - m) * l, and the target's logit where this rank owns it.

    In place, logits become exp(l - m).
    """
    if not logits.shape[1]:  # only padding rows here: nothing to add to the other ranks'
        stats = torch.zeros(4, logits.shape[0], dtype=torch.float32, device=logits.device)
        stats[0] = -torch.inf
        return stats
    targets = logits.gather(1, local_targets[:, None]).squeeze(1) * owned
    maximum = logits.amax(dim=-1)
    total, weighted = torch.empty_like(maximum), torch.empty_like(maximum)
    blocks = _blocks(logits)
    buffer = torch.empty_like(logits[blocks[0]])
    for block in blocks:
        exp = logits[block].sub_(maximum[block, None])
        shifted = buffer[: exp.shape[0]].copy_(exp)
        total[block] = exp.exp_().sum(dim=-1)
        weighted[block] = shifted.mul_(exp).sum(dim=-1)
    return torch.stack((maximum, total, weighted + maximum * total, targets))


def _blocks(logits: Tensor) -> list[slice]:
    """Rows that stay in a CPU's cache from one elementwise operation to the next."""
    rows = max(1, BLOCK_ELEMENTS // max(1, logits.shape[1]))
    return [slice(start, start + rows) for start in range(0, logits.shape[0], rows)]


def _over_ranks(stats: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, ...]:
    """[4, R] of every rank of the group, as four [ranks, R] tensors."""
    if group is None:
        return tuple(row[None] for row in stats)
    ranks = dist.get_world_size(group)
    gathered = torch.empty(ranks * stats.shape[0], stats.shape[1], dtype=stats.dtype, device=stats.device)
    dist.all_gather_into_tensor(gathered, stats, group=group)
    return tuple(gathered.view(ranks, *stats.shape).unbind(dim=1))
