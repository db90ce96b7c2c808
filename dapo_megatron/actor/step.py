"""The DAPO loss inside megatron-core's forward_backward schedule.

Shape letters: T packed tokens, R trained tokens of a micro-batch.

The loss function returns megatron-core's three-part form (loss sum, token count, metrics). With
`calculate_per_token_loss=True` the schedule sums losses over micro-batches and `finalize_model_grads` divides the gradients by the
token count over all micro-batches and data-parallel ranks, so each trained token counts once under every layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from dapo_megatron.actor.log_probs import Vocabulary, log_probs_and_entropy
from dapo_megatron.actor.micro_batch import MicroBatchTensors
from dapo_megatron.actor.parallel import holds_loss
from dapo_megatron.algo.dapo_loss import dapo_token_loss
from dapo_megatron.config.schema import AlgoConfig


@dataclass(frozen=True, slots=True)
class LmHead:
    """How hidden states become log-probabilities; called by GPTModel through its `output_processor` hook."""

    vocab_size: int
    temperature: float
    chunk_tokens: int
    trains_entropy: bool
    """Whether the loss has an entropy term; without one the entropy's gradient costs nothing."""

    def __call__(
        self,
        *,
        hidden_states: Tensor,
        output_layer: Any,
        output_weight: Tensor | None,
        context: MicroBatchTensors,
        config: Any,
        **_: Any,
    ) -> Tensor:
        """hidden_states [T, 1, H] ([T / TP, 1, H] under sequence parallelism) -> log-probs and entropies, fp32 [2, R]."""
        weight = output_layer.weight if output_weight is None else output_weight
        if config.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=True)
        rows = hidden_states.squeeze(1).index_select(0, context.rows)
        log_probs, entropy = log_probs_and_entropy(
            rows,
            weight,
            context.targets,
            vocabulary=self._vocabulary(weight.shape[0]),
            temperature=self.temperature,
            chunk_tokens=self.chunk_tokens,
            reduce_hidden_grad=not config.sequence_parallel,
        )
        return torch.stack((log_probs, entropy if self.trains_entropy else entropy.detach()))

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
    """Sums and maxima over the trained tokens of one optimizer step, over all micro-batches and data-parallel ranks."""

    loss_sum: float
    num_loss_tokens: int
    entropy_sum: float
    probability_sum: float
    num_clipped_low: int
    num_clipped_high: int
    log_prob_diff_sum: float
    num_on_policy_tokens: int
    log_prob_diff_max: float
    ratio_max: float


_NUM_SUMS = 8


def train_micro_batches(
    chunks: Sequence[Any],
    micro_batches: Sequence[MicroBatchTensors],
    head: LmHead,
    algo: AlgoConfig,
    old_log_probs: Sequence[Tensor] | None,
) -> LossStatistics:
    """Forward and backward over the micro-batches of one optimizer step; gradients are left in the DDP buffers.

    chunks: DDP-wrapped model chunks. old_log_probs: fp32 [R] a micro-batch, on last-stage ranks; None: this forward pass's own
    values, which is exact when the weights have not changed since sampling. Tokens that are not `on_policy`, and all tokens with
    `algo.old_log_probs: engine`, take the engine's log-probs instead. `log_prob_diff` is |actor - engine| over on-policy tokens.
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


def _forward(batch: MicroBatchTensors, model: Any, head: LmHead) -> Tensor:
    return model(
        batch.input_ids, None, None, packed_seq_params=batch.packed, output_processor=head, output_processor_context=batch
    )


def _forward_loss(
    items: Iterator[tuple[MicroBatchTensors, Tensor | None]], model: Any, *, head: LmHead, algo: AlgoConfig
) -> tuple:
    batch, old_log_probs = next(items)
    return _forward(batch, model, head), partial(_loss, batch=batch, old_log_probs=old_log_probs, algo=algo)


def _forward_log_probs(items: Iterator[tuple[MicroBatchTensors, None]], model: Any, *, head: LmHead) -> tuple:
    batch, _ = next(items)
    return _forward(batch, model, head), lambda output, non_loss_data: output[0]


def _loss(output: Tensor, *, batch: MicroBatchTensors, old_log_probs: Tensor | None, algo: AlgoConfig) -> tuple:
    """output [2, R] -> (loss sum, token count, sums for the metrics)."""
    log_probs, entropy = output
    actors = log_probs.detach() if old_log_probs is None else old_log_probs
    # A token sampled by older weights: only the engine's log-prob is of the distribution it was drawn from.
    from_engine = ~batch.on_policy if algo.old_log_probs == "actor" else torch.ones_like(batch.on_policy)
    old = torch.where(from_engine, batch.rollout_log_probs, actors)
    token_loss = dapo_token_loss(
        log_probs,
        old,
        batch.advantages,
        clip_ratio_low=algo.clip_ratio_low,
        clip_ratio_high=algo.clip_ratio_high,
        dual_clip=algo.dual_clip,
    )
    loss = token_loss.loss
    if algo.entropy_coefficient:
        loss = loss - algo.entropy_coefficient * entropy
    loss_sum = (loss * batch.loss_weights).sum()
    num_tokens = torch.tensor(log_probs.numel(), dtype=torch.int, device=loss.device)
    with torch.no_grad():
        difference = torch.where(batch.on_policy, (actors - batch.rollout_log_probs).abs(), 0.0)
        sums = [
            loss_sum,
            num_tokens,
            entropy.sum(),
            log_probs.exp().sum(),
            token_loss.clipped_low.sum(),
            token_loss.clipped_high.sum(),
            difference.sum(),
            batch.on_policy.sum(),
        ]
        maxima = [x.max() if x.numel() else torch.zeros((), device=loss.device) for x in (difference, token_loss.ratio)]
        stats = torch.stack([x.detach().double() for x in (*sums, *maxima)])
    return loss_sum, num_tokens, {"stats": stats}


def _reduce(stats: list[Tensor], device: torch.device) -> LossStatistics:
    """Over micro-batches, then over all ranks; only one rank per data-parallel copy contributes."""
    total = torch.zeros(_NUM_SUMS + 2, dtype=torch.float64, device=device)
    if stats and holds_loss():
        stacked = torch.stack(stats)
        total[:_NUM_SUMS] = stacked[:, :_NUM_SUMS].sum(dim=0)
        total[_NUM_SUMS:] = stacked[:, _NUM_SUMS:].amax(dim=0)
    dist.all_reduce(total[:_NUM_SUMS])
    dist.all_reduce(total[_NUM_SUMS:], op=dist.ReduceOp.MAX)
    loss, tokens, entropy, probability, low, high, difference, on_policy, difference_max, ratio_max = total.tolist()
    return LossStatistics(
        loss, int(tokens), entropy, probability, int(low), int(high), difference, int(on_policy), difference_max, ratio_max
    )
