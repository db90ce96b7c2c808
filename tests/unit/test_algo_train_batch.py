"""From groups to optimizer steps: rewards, advantages, filtering, splitting, weights, and the objective they add up to."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dapo_megatron.algo.dapo_loss import dapo_token_loss
from dapo_megatron.algo.train_batch import TrainBatchRules, build_train_batch, shaped_rewards
from dapo_megatron.types import (
    FinishReason,
    OptimizerStepBatch,
    Prompt,
    RolloutGroup,
    Sample,
    Score,
    TrainBatch,
    TrainSample,
)

reproducible = settings(derandomize=True, deadline=None)

RULES = TrainBatchRules(num_updates=1, data_parallel_size=1, max_tokens_per_micro_batch=1000, max_response_tokens=100)


def group(
    group_id: int, lengths: list[int], correct: list[bool], finish_reasons: list[FinishReason] | None = None
) -> RolloutGroup:
    """A group whose token ids tell where they come from: 100 * group + sample in the response, -group in the prompt."""
    samples = tuple(
        Sample(
            token_ids=(100 * group_id + at,) * length,
            log_probs=tuple(-0.1 * (at + 1) - 0.01 * t for t in range(length)),
            weight_versions=(0,) * length,
            finish_reason=reason,
            text="",
        )
        for at, (length, reason) in enumerate(zip(lengths, finish_reasons or ["stop"] * len(lengths), strict=True))
    )
    scores = tuple(Score(reward=1.0 if right else -1.0, correct=right) for right in correct)
    return RolloutGroup(group_id, Prompt(group_id, (-group_id,) * 3, "", ""), samples, scores)


def samples_of(step: OptimizerStepBatch) -> list[TrainSample]:
    return [sample for rank in step.micro_batches for micro_batch in rank for sample in micro_batch]


def by_response(batch: TrainBatch) -> dict[int, TrainSample]:
    return {sample.token_ids[-1]: sample for step in batch.optimizer_steps for sample in samples_of(step)}


def groups_of(step: OptimizerStepBatch) -> set[int]:
    return {-sample.token_ids[0] for sample in samples_of(step)}


def test_train_sample_is_prompt_then_response_with_the_engines_log_probs():
    scored = group(2, [4, 5], [True, False])
    sample = by_response(build_train_batch([scored], RULES, seed=0, weight_version=0))[201]
    assert sample.token_ids.tolist() == [-2, -2, -2, 201, 201, 201, 201, 201]
    assert sample.num_prompt_tokens == 3 and sample.num_loss_tokens == 5
    assert sample.rollout_log_probs.tolist() == scored.samples[1].log_probs.tolist()
    assert sample.loss_weight == 1.0


def test_shaped_reward_is_the_score_plus_the_overlong_punishment():
    scored = group(1, [10, 80, 90, 100], [True, True, False, True])
    assert shaped_rewards(scored, RULES) == [1, 1, -1, 1]
    assert shaped_rewards(scored, replace(RULES, overlong_cache_tokens=20)) == [1, 1, -1.5, 0]


def test_advantages_come_from_shaped_rewards_of_the_whole_group():
    rules = replace(RULES, overlong_cache_tokens=20, normalize_advantage_by_std=False)
    batch = build_train_batch(
        [group(1, [10, 90], [True, False]), group(2, [10, 10], [True, False])], rules, seed=0, weight_version=0
    )
    advantages = {token: sample.advantage for token, sample in by_response(batch).items()}
    assert advantages == {100: 1.25, 101: -1.25, 200: 1.0, 201: -1.0}


def test_group_with_equal_shaped_rewards_trains_with_zero_advantages():
    batch = build_train_batch([group(1, [10, 20, 30], [True, True, True])], RULES, seed=0, weight_version=0)
    assert [sample.advantage for sample in samples_of(batch.optimizer_steps[0])] == [0.0] * 3
    assert batch.optimizer_steps[0].num_loss_tokens == 60


def test_filtered_truncated_samples_leave_the_loss_but_stay_in_the_advantages():
    truncated = group(1, [10, 100, 20], [True, False, False], ["stop", "length", "stop"])
    kept = by_response(build_train_batch([truncated], replace(RULES, normalize_advantage_by_std=False), seed=0, weight_version=0))
    filtered_batch = build_train_batch(
        [truncated], replace(RULES, normalize_advantage_by_std=False, overlong_filtering=True), seed=0, weight_version=0
    )
    filtered = by_response(filtered_batch)
    assert set(kept) == {100, 101, 102} and set(filtered) == {100, 102}
    assert filtered[100].advantage == kept[100].advantage == pytest.approx(4 / 3)
    assert filtered_batch.optimizer_steps[0].num_loss_tokens == 30


def test_weights_and_normaliser_count_only_trained_samples():
    truncated = group(1, [10, 100], [True, False], ["stop", "length"])
    whole = group(2, [20, 20], [True, False])
    rules = replace(RULES, overlong_filtering=True, loss_aggregation="prompt_mean")
    batch = build_train_batch([truncated, whole], rules, seed=0, weight_version=0)
    assert batch.optimizer_steps[0].num_loss_tokens == 50
    weights = {token: sample.loss_weight for token, sample in by_response(batch).items()}
    assert weights == {100: 50 / (2 * 10), 200: 50 / (2 * 40), 201: 50 / (2 * 40)}


def test_responses_without_tokens_are_dropped():
    batch = build_train_batch(
        [group(1, [0, 5], [False, True])], replace(RULES, normalize_advantage_by_std=False), seed=0, weight_version=0
    )
    (sample,) = samples_of(batch.optimizer_steps[0])
    assert sample.token_ids[-1] == 101 and sample.advantage == 1.0


def test_step_without_trained_tokens_is_dropped():
    nothing_left = group(1, [100, 100], [True, False], ["length", "length"])
    rules = replace(RULES, overlong_filtering=True, num_updates=2)
    batch = build_train_batch([nothing_left, group(2, [5, 5], [True, False])], rules, seed=0, weight_version=0)
    assert [groups_of(step) for step in batch.optimizer_steps] == [{2}]


def test_no_groups_give_no_optimizer_steps():
    assert build_train_batch([], RULES, seed=0, weight_version=0) == TrainBatch(())


@pytest.mark.parametrize(
    ("num_groups", "num_updates", "sizes"), [(16, 4, [4] * 4), (10, 4, [2, 3, 2, 3]), (3, 16, [1] * 3), (5, 1, [5])]
)
def test_groups_are_split_evenly_over_optimizer_steps(num_groups, num_updates, sizes):
    groups = [group(at, [5, 5], [True, False]) for at in range(1, num_groups + 1)]
    steps = build_train_batch(groups, replace(RULES, num_updates=num_updates), seed=0, weight_version=0).optimizer_steps
    assert [len(groups_of(step)) for step in steps] == sizes
    assert sorted(group_id for step in steps for group_id in groups_of(step)) == list(range(1, num_groups + 1))
    assert all(len(samples_of(step)) == 2 * len(groups_of(step)) for step in steps)


def test_seed_decides_the_split_and_arrival_order_does_not():
    groups = [group(at, [5, 5], [True, False]) for at in range(1, 17)]
    rules = replace(RULES, num_updates=4)
    batch = build_train_batch(groups, rules, seed=3, weight_version=0)
    assert build_train_batch(groups[::-1], rules, seed=3, weight_version=0) == batch
    other = build_train_batch(groups, rules, seed=4, weight_version=0)
    assert [groups_of(step) for step in other.optimizer_steps] != [groups_of(step) for step in batch.optimizer_steps]


@pytest.mark.parametrize(("multiple", "sizes_of_a_rank"), [(1, [1, 1]), (4, [1, 1, 0, 0])])
def test_micro_batches_count_prompt_tokens_and_follow_the_pipeline_multiple(multiple, sizes_of_a_rank):
    groups = [group(1, [7, 7, 7, 7], [True, False, True, False])]  # two responses would fit, but not with their prompts
    rules = replace(RULES, data_parallel_size=2, max_tokens_per_micro_batch=14, num_micro_batches_multiple=multiple)
    (step,) = build_train_batch(groups, rules, seed=0, weight_version=0).optimizer_steps
    assert [[len(micro_batch) for micro_batch in rank] for rank in step.micro_batches] == [sizes_of_a_rank] * 2


def test_samples_of_a_group_stay_in_one_micro_batch_where_they_fit():
    groups = [group(at, [7] * 4, [True, False, True, False]) for at in range(1, 6)]
    rules = replace(RULES, max_tokens_per_micro_batch=199)  # 40 tokens a group with its prompts: no room for all five
    (step,) = build_train_batch(groups, rules, seed=0, weight_version=0).optimizer_steps
    (micro_batches,) = step.micro_batches
    assert len(micro_batches) == 2
    assert all(len({sample.token_ids[0] for sample in micro_batch}) * 4 == len(micro_batch) for micro_batch in micro_batches)


# the objective: what the actor sums over ranks and micro-batches equals eq. 8 computed straight from the groups


def new_log_prob(token: int, position: int) -> float:
    """Log-prob under the new policy, a made-up function of where the token stands; crosses both clip bounds."""
    return -0.1 * (token % 100 + 1) - 0.01 * position + 0.5 * np.sin(token + 2.0 * position)


def objective_of_batch(step: OptimizerStepBatch) -> float:
    total = 0.0
    for rank in step.micro_batches:
        for micro_batch in rank:
            for sample in micro_batch:
                response = sample.token_ids[sample.num_prompt_tokens :]
                result = dapo_token_loss(
                    torch.tensor([new_log_prob(token, at) for at, token in enumerate(response)], dtype=torch.float64),
                    torch.tensor(sample.rollout_log_probs, dtype=torch.float64),
                    torch.full((len(response),), sample.advantage, dtype=torch.float64),
                    clip_ratio_low=0.2,
                    clip_ratio_high=0.28,
                )
                total += sample.loss_weight * result.loss.sum().item()
    return total / step.num_loss_tokens


def objective_of_groups(groups: list[RolloutGroup], aggregation: str) -> float:
    """-J in numpy, group by group; the clipped minimum as a bound on the advantage's own side of the ratio."""
    losses: list[list[np.ndarray]] = []
    for scored in groups:
        rewards = np.array([score.reward for score in scored.scores])
        deviation = rewards.std(ddof=1)
        advantages = (rewards - rewards.mean()) / (deviation + 1e-6)
        of_group = []
        for sample, advantage in zip(scored.samples, advantages, strict=True):
            new = np.array([new_log_prob(token, at) for at, token in enumerate(sample.token_ids)])
            ratio = np.exp(new - np.array(sample.log_probs))
            bounded = np.minimum(ratio, 1.28) if advantage > 0 else np.maximum(ratio, 0.8)
            of_group.append(-bounded * advantage)
        losses.append(of_group)
    match aggregation:
        case "token_mean":
            return float(np.concatenate([tokens for of_group in losses for tokens in of_group]).mean())
        case "prompt_mean":
            return float(np.mean([np.concatenate(of_group).mean() for of_group in losses]))
        case _:
            return float(np.mean([tokens.mean() for of_group in losses for tokens in of_group]))


group_shapes = st.lists(
    st.lists(st.tuples(st.integers(1, 12), st.booleans()), min_size=2, max_size=5), min_size=1, max_size=5
)  # (response length, correct) of every sample of every group


@reproducible
@given(
    group_shapes,
    st.sampled_from(["token_mean", "prompt_mean", "sample_mean"]),
    st.integers(1, 3),
    st.integers(1, 60),
    st.integers(1, 2),
)
def test_objective_equals_eq_8_for_any_cut_into_ranks_and_micro_batches(shapes, aggregation, num_ranks, max_tokens, multiple):
    groups = [group(at, *(list(column) for column in zip(*shape, strict=True))) for at, shape in enumerate(shapes, start=1)]
    rules = replace(
        RULES,
        loss_aggregation=aggregation,
        data_parallel_size=num_ranks,
        max_tokens_per_micro_batch=max_tokens,
        num_micro_batches_multiple=multiple,
    )
    (step,) = build_train_batch(groups, rules, seed=0, weight_version=0).optimizer_steps
    assert step.num_loss_tokens == sum(scored.num_tokens for scored in groups)
    assert objective_of_batch(step) == pytest.approx(objective_of_groups(groups, aggregation), rel=1e-9, abs=1e-12)
