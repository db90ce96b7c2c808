"""The DAPO loss inside megatron-core's forward_backward schedule.

Shape letters: T packed tokens, R trained tokens of a micro-batch, both of this rank: context-parallel ranks have different ones.

The head computes the loss, a chunk of tokens at a time, and its gradient with it (`log_probs.py`). The loss function given to the
schedule returns megatron-core's three-part form (loss sum, token count, metrics). With
`calculate_per_token_loss=True` the schedule sums losses over micro-batches and `finalize_model_grads` divides the gradients by the
token count over all micro-batches, data-parallel and context-parallel ranks, so each trained token counts once under every layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from dapo_megatron.actor.log_probs import Vocabulary, head_loss, log_probs_and_entropy
from dapo_megatron.actor.micro_batch import MicroBatchTensors
from dapo_megatron.actor.parallel import holds_loss
from dapo_megatron.algo.dapo_loss import TokenLoss, dapo_token_loss, k3_divergence
from dapo_megatron.config.schema import AlgoConfig


@dataclass(frozen=True, slots=True)
class MicroBatchLoss:
    """The DAPO loss of a micro-batch's trained tokens, any rows of them at a time.

    `old_log_probs` fp32 [R]; None: the log-probs at hand themselves. Without `algo.tis_clip`, tokens that are not `on_policy`, and all
    tokens with `algo.old_log_probs: engine`, take the engine's log-probs instead: only those are of the distribution they were drawn
    from. With it, all tokens take the actor's, and a weight corrects for the distribution.
    """

    batch: MicroBatchTensors
    old_log_probs: Tensor | None
    algo: AlgoConfig

    def __call__(self, log_probs: Tensor, entropy: Tensor, rows: slice) -> Tensor:
        """Weighted sum over the rows, differentiable in `log_probs` and, with an entropy term, in `entropy`."""
        loss = self.of_tokens(log_probs, rows).loss
        if self.algo.entropy_coefficient:
            loss = loss - self.algo.entropy_coefficient * entropy
        return (loss * self.batch.loss_weights[rows]).sum()

    def of_tokens(self, log_probs: Tensor, rows: slice) -> TokenLoss:
        """Unweighted, without the entropy term."""
        on_policy, rollout_log_probs = self.batch.on_policy[rows], self.batch.rollout_log_probs[rows]
        old_log_probs = self.actors(log_probs, rows)
        if self.algo.tis_clip is None:
            from_engine = ~on_policy if self.algo.old_log_probs == "actor" else torch.ones_like(on_policy)
            old_log_probs = torch.where(from_engine, rollout_log_probs, old_log_probs)
        return dapo_token_loss(
            log_probs,
            old_log_probs,
            self.batch.advantages[rows],
            clip_ratio_low=self.algo.clip_ratio_low,
            clip_ratio_high=self.algo.clip_ratio_high,
            dual_clip=self.algo.dual_clip,
            rollout_log_probs=rollout_log_probs,
            tis_clip=self.algo.tis_clip,
        )

    def actors(self, log_probs: Tensor, rows: slice) -> Tensor:
        """The actor's log-probs at the start of the rollout step: at the weights that sampled, where a token is on-policy."""
        return log_probs.detach() if self.old_log_probs is None else self.old_log_probs[rows]


@dataclass(frozen=True, slots=True)
class HeadInput:
    """What the head needs besides hidden states; without a loss it gives log-probs alone."""

    batch: MicroBatchTensors
    loss: MicroBatchLoss | None


@dataclass(frozen=True, slots=True)
class LmHead:
    """How hidden states become log-probabilities and the loss; called by GPTModel through its `output_processor` hook."""

    vocab_size: int
    temperature: float
    chunk_tokens: int

    def __call__(
        self,
        *,
        hidden_states: Tensor,
        output_layer: Any,
        output_weight: Tensor | None,
        context: HeadInput,
        config: Any,
        **_: Any,
    ) -> Tensor | tuple[Tensor, ...]:
        """hidden_states [T, 1, H] ([T / TP, 1, H] under sequence parallelism) -> (loss sum, log-probs [R], entropies [R]), fp32.

        Log-probs alone without a loss: of a model with experts the schedule takes one tensor.
        """
        weight = output_layer.weight if output_weight is None else output_weight
        if config.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=True)
        rows = hidden_states.squeeze(1).index_select(0, context.batch.rows)
        targets, vocabulary = context.batch.targets, self._vocabulary(weight.shape[0])
        if context.loss is None:
            return log_probs_and_entropy(
                rows, weight, targets, vocabulary=vocabulary, temperature=self.temperature, chunk_tokens=self.chunk_tokens
            )[0]
        return head_loss(
            rows,
            weight,
            targets,
            context.loss,
            vocabulary=vocabulary,
            temperature=self.temperature,
            chunk_tokens=self.chunk_tokens,
            reduce_hidden_grad=not config.sequence_parallel,
        )

    def _vocabulary(self, rows_per_rank: int) -> Vocabulary:
        start = parallel_state.get_tensor_model_parallel_rank() * rows_per_rank
        group = (
            parallel_state.get_tensor_model_parallel_group()
            if parallel_state.get_tensor_model_parallel_world_size() > 1
            else None
        )
        return Vocabulary(start, max(0, min(rows_per_rank, self.vocab_size - start)), group)


@dataclass(frozen=True, slots=True)
class LossStatistics:
    """Sums, then maxima, over the trained tokens of one optimizer step: all micro-batches, data-parallel and context-parallel ranks."""

    loss_sum: float
    num_loss_tokens: int
    entropy_sum: float
    probability_sum: float
    num_clipped_low: int
    num_clipped_high: int
    log_prob_diff_sum: float
    num_on_policy_tokens: int
    mismatch_sum: float
    mismatch_k3_sum: float
    num_truncated: int
    log_prob_diff_max: float
    ratio_max: float
    mismatch_max: float


_NUM_SUMS, _NUM_MAXIMA = 11, 3


def train_micro_batches(
    chunks: Sequence[Any],
    micro_batches: Sequence[MicroBatchTensors],
    head: LmHead,
    algo: AlgoConfig,
    old_log_probs: Sequence[Tensor] | None,
) -> LossStatistics:
    """Forward and backward over the micro-batches of one optimizer step; gradients are left in the DDP buffers.

    chunks: DDP-wrapped model chunks. old_log_probs: fp32 [R] a micro-batch, on last-stage ranks; None: this forward pass's own
    values, which is exact for the first optimizer step. `log_prob_diff` is |actor - engine| over on-policy tokens, `mismatch` over all.
    """
    indexed = [(batch, old_log_probs[i] if old_log_probs else None) for i, batch in enumerate(micro_batches)]
    collected = _run_schedule(chunks, indexed, partial(_forward_loss, head=head, algo=algo), forward_only=False)
    return _reduce([data["stats"] for data in collected], micro_batches[0].input_ids.device)


def evaluate_loss(chunks: Sequence[Any], micro_batches: Sequence[MicroBatchTensors], head: LmHead, algo: AlgoConfig) -> float:
    """Mean loss per trained token against the engine's log-probs, without gradients; the same on every rank."""
    with torch.no_grad():
        items = [(batch, None) for batch in micro_batches]
        collected = _run_schedule(chunks, items, partial(_forward_loss, head=head, algo=algo), forward_only=True)
    statistics = _reduce([data["stats"] for data in collected], micro_batches[0].input_ids.device)
    return statistics.loss_sum / statistics.num_loss_tokens


def compute_log_probs(chunks: Sequence[Any], micro_batches: Sequence[MicroBatchTensors], head: LmHead) -> list[Tensor]:
    """Log-probs of the trained tokens, fp32 [R] a micro-batch, on last-stage ranks; an empty list elsewhere."""
    with torch.no_grad():
        return _run_schedule(
            chunks,
            [(batch, None) for batch in micro_batches],
            partial(_forward_log_probs, head=head),
            forward_only=True,
            collect_non_loss_data=True,
        )


def _run_schedule(chunks: Sequence[Any], items: Sequence[Any], forward_step: Any, **options: Any) -> list[Any]:
    assert chunks[0].config.calculate_per_token_loss, "without it megatron-core divides the loss by local token counts"
    iterators: Any = [iter(items) for _ in chunks]
    result = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=list(chunks) if len(chunks) > 1 else chunks[0],
        num_microbatches=len(items),
        seq_length=1,  # ignored: variable_seq_lengths
        micro_batch_size=1,
        **options,
    )
    return result or []


def _forward(model: Any, head: LmHead, batch: MicroBatchTensors, loss: MicroBatchLoss | None) -> Any:
    return model(
        batch.input_ids,
        None,
        None,
        packed_seq_params=batch.packed,
        output_processor=head,
        output_processor_context=HeadInput(batch, loss),
    )


def _forward_loss(
    items: Iterator[tuple[MicroBatchTensors, Tensor | None]], model: Any, *, head: LmHead, algo: AlgoConfig
) -> tuple:
    batch, old_log_probs = next(items)
    loss = MicroBatchLoss(batch, old_log_probs, algo)
    return _forward(model, head, batch, loss), partial(_three_parts, loss=loss)


def _forward_log_probs(items: Iterator[tuple[MicroBatchTensors, None]], model: Any, *, head: LmHead) -> tuple:
    batch, _ = next(items)
    return _forward(model, head, batch, None), lambda output, non_loss_data: output


def _three_parts(output: tuple[Tensor, Tensor, Tensor], *, loss: MicroBatchLoss) -> tuple:
    """(loss sum, log-probs [R], entropies [R]) -> (loss sum, token count, sums for the metrics)."""
    loss_sum, log_probs, entropy = output
    batch, rows = loss.batch, slice(None)
    num_tokens = torch.tensor(log_probs.numel(), dtype=torch.int, device=log_probs.device)
    with torch.no_grad():
        tokens = loss.of_tokens(log_probs, rows)
        actors = loss.actors(log_probs, rows)
        mismatch = (actors - batch.rollout_log_probs).abs()
        difference = torch.where(batch.on_policy, mismatch, 0.0)
        sums = [
            loss_sum,
            num_tokens,
            entropy.sum(),
            log_probs.exp().sum(),
            tokens.clipped_low.sum(),
            tokens.clipped_high.sum(),
            difference.sum(),
            batch.on_policy.sum(),
            mismatch.sum(),
            k3_divergence(actors, batch.rollout_log_probs).sum(),
            tokens.truncated.sum(),
        ]
        maxima = [x.max() if x.numel() else torch.zeros((), device=x.device) for x in (difference, tokens.ratio, mismatch)]
        stats = torch.stack([x.detach().double() for x in (*sums, *maxima)])
    return loss_sum, num_tokens, {"stats": stats}


def _reduce(stats: list[Tensor], device: torch.device) -> LossStatistics:
    """Over micro-batches, then over all ranks; each trained token counts on one of them."""
    total = torch.zeros(_NUM_SUMS + _NUM_MAXIMA, dtype=torch.float64, device=device)
    if stats and holds_loss():
        stacked = torch.stack(stats)
        total[:_NUM_SUMS] = stacked[:, :_NUM_SUMS].sum(dim=0)
        total[_NUM_SUMS:] = stacked[:, _NUM_SUMS:].amax(dim=0)
    dist.all_reduce(total[:_NUM_SUMS])
    dist.all_reduce(total[_NUM_SUMS:], op=dist.ReduceOp.MAX)
    counts = {"num_loss_tokens", "num_clipped_low", "num_clipped_high", "num_on_policy_tokens", "num_truncated"}
    names = [field.name for field in fields(LossStatistics)]
    values = {name: int(value) if name in counts else value for name, value in zip(names, total.tolist(), strict=True)}
    return LossStatistics(**values)
