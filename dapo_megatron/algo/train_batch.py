"""From the scored groups of one rollout step to the optimizer steps the actor takes on them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dapo_megatron.algo.advantage import AdvantageStd, group_advantages
from dapo_megatron.algo.aggregation import sample_loss_weights
from dapo_megatron.algo.overlong import soft_overlong_punishment
from dapo_megatron.algo.packing import pack_micro_batches, runs_of_groups
from dapo_megatron.arrays import pieces
from dapo_megatron.types import LossAggregation, OptimizerStepBatch, RolloutGroup, TrainBatch, TrainSample


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainBatchRules:
    """Everything besides the groups and the seed that decides a TrainBatch; constant over a run."""

    num_updates: int
    """Optimizer steps per rollout step; with fewer groups than that, one step per group."""
    data_parallel_size: int
    """Ranks that share the samples of an optimizer step."""
    max_tokens_per_micro_batch: int
    """Prompt and response tokens of one micro-batch; a longer single sequence gets a micro-batch of its own."""
    num_micro_batches_multiple: int = 1
    """Every rank's number of micro-batches is a multiple of this: the pipeline size under interleaving, else 1."""
    max_response_tokens: int
    """L_max of eq. 13: generation stops here."""
    overlong_cache_tokens: int = 0
    """L_cache of eq. 13; 0: no soft overlong punishment."""
    overlong_filtering: bool = False
    """Leave truncated samples (`finish_reason == "length"`) out of the loss."""
    normalize_advantage_by_std: bool = True
    """Divide advantages by the group's standard deviation (eq. 9)."""
    advantage_std: AdvantageStd = "sample"
    """Which standard deviation, see `group_advantages`."""
    loss_aggregation: LossAggregation = "token_mean"
    """How token losses are averaged, see `sample_loss_weights`."""


def shaped_rewards(group: RolloutGroup, rules: TrainBatchRules) -> list[float]:
    """Reward of each sample of the group as it is optimised: the score's reward plus soft overlong punishment."""
    return [
        score.reward + soft_overlong_punishment(len(sample.token_ids), rules.max_response_tokens, rules.overlong_cache_tokens)
        for sample, score in zip(group.samples, group.scores, strict=True)
    ]


def build_train_batch(groups: Sequence[RolloutGroup], rules: TrainBatchRules, *, seed: int, weight_version: int) -> TrainBatch:
    """Optimizer steps for the groups of one rollout step, in order.

    Groups are shuffled by `seed` (the order in which they arrive does not matter) and cut into near-equal runs, one per
    optimizer step; the samples of a group stay together in a step. Loss weights and `num_loss_tokens` are those of
    the whole step, over all ranks and micro-batches. A group with a token of weights older than `weight_version`, the actor's
    present ones, is marked as not on-policy. A step left without trained tokens is dropped; no groups, no steps.
    """
    order = sorted(groups, key=lambda group: group.group_id)
    random.Random(seed).shuffle(order)
    num_steps = min(rules.num_updates, len(order))
    cuts = [slice(len(order) * at // num_steps, len(order) * (at + 1) // num_steps) for at in range(num_steps)]
    steps = [_optimizer_step(order[cut], rules, weight_version) for cut in cuts]
    return TrainBatch(tuple(step for step in steps if step.num_loss_tokens))


def _trained(group: RolloutGroup, rules: TrainBatchRules) -> list[int]:
    """Indices of the samples that enter the loss. The others still count in the mean and the standard deviation of rewards."""
    return [
        index
        for index, sample in enumerate(group.samples)
        if len(sample.token_ids) and not (rules.overlong_filtering and sample.finish_reason == "length")
    ]


def _optimizer_step(groups: Sequence[RolloutGroup], rules: TrainBatchRules, weight_version: int) -> OptimizerStepBatch:
    trained = [(group, _trained(group, rules)) for group in groups]
    num_tokens = [len(group.samples[index].token_ids) for group, indices in trained for index in indices]
    group_ids = [group.group_id for group, indices in trained for _ in indices]
    weights = iter(sample_loss_weights(rules.loss_aggregation, num_tokens, group_ids))
    samples = [
        sample
        for group, indices in trained
        if indices
        for sample in _train_samples(group, indices, rules, weight_version, weights)
    ]
    return cut_optimizer_step(samples, rules)


def _train_samples(
    group: RolloutGroup, trained: Sequence[int], rules: TrainBatchRules, weight_version: int, weights: Iterator[float]
) -> Iterator[TrainSample]:
    """Those of the group that enter the loss, one at least, whose next weights are taken."""
    advantages = group_advantages(
        shaped_rewards(group, rules), normalize_by_std=rules.normalize_advantage_by_std, std=rules.advantage_std
    )
    prompt = np.array(group.prompt.token_ids, np.int32)
    responses = [group.samples[index].token_ids for index in trained]
    flat = np.concatenate([part for response in responses for part in (prompt, response)])
    sequences = pieces(flat, [len(prompt) + len(response) for response in responses])
    on_policy = group.oldest_weight_version >= weight_version
    for index, sequence in zip(trained, sequences, strict=True):
        log_probs = group.samples[index].log_probs
        yield TrainSample(sequence, len(prompt), log_probs, advantages[index], next(weights), on_policy)


def cut_optimizer_step(samples: Sequence[TrainSample], rules: TrainBatchRules) -> OptimizerStepBatch:
    """The samples of one optimizer step in micro-batches; what a layout decides about a batch is decided here.

    Neighbours of one prompt go into a micro-batch together, as far as that balances.
    """
    lengths = [len(sample.token_ids) for sample in samples]
    prompts = [sample.token_ids[: sample.num_prompt_tokens].tobytes() for sample in samples]
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    runs = runs_of_groups(
        lengths,
        [numbers[prompt] for prompt in prompts],
        num_ranks=rules.data_parallel_size * rules.num_micro_batches_multiple,
        max_tokens=rules.max_tokens_per_micro_batch,
    )
    packed = pack_micro_batches(
        [sum(lengths[index] for index in run) for run in runs],
        num_ranks=rules.data_parallel_size,
        max_tokens=rules.max_tokens_per_micro_batch,
        num_micro_batches_multiple=rules.num_micro_batches_multiple,
    )
    micro_batches = tuple(
        tuple(tuple(samples[index] for run in micro_batch for index in runs[run]) for micro_batch in rank) for rank in packed
    )
    return OptimizerStepBatch(micro_batches=micro_batches, num_loss_tokens=sum(sample.num_loss_tokens for sample in samples))
