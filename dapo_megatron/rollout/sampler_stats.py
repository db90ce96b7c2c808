"""Where the groups and tokens of one rollout step came from and went."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from dapo_megatron.types import RolloutGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerStats:
    """Every group and every response token of a step is accounted for:

    generated + (surplus kept by the step before) = kept (used) + zero variance + stale + surplus kept.

    Means are over all groups *generated* in this step, before the filter; None when the surplus alone filled the step.
    """

    num_groups_generated: int
    num_groups_kept: int
    """Groups of the batch."""
    num_groups_zero_variance: int
    """Generated groups dropped for an accuracy of 0 or 1."""
    num_groups_all_correct: int
    """Generated groups of accuracy 1, dropped or not."""
    num_groups_all_wrong: int
    """Generated groups of accuracy 0, dropped or not."""
    num_groups_surplus_used: int
    """Groups of the batch that an earlier step generated."""
    num_groups_surplus_kept: int
    """Accepted groups left for the next step."""
    num_groups_stale: int
    """Surplus groups dropped for their age."""
    num_tokens_generated: int
    num_tokens_used: int
    num_tokens_zero_variance: int
    num_tokens_surplus_kept: int
    num_tokens_stale: int
    num_samples_scored_by_default: int
    """Generated samples on which the reward function gave no verdict of its own."""
    accuracy: float | None
    """Share of correct samples."""
    reward: float | None
    response_length_tokens: float | None
    truncated_fraction: float | None
    """Share of samples that ended at max_response_tokens."""
    limit_reached: bool
    """Whether rollout.max_over_sampling ended the step before it was full."""

    @classmethod
    def of(
        cls,
        *,
        generated: Sequence[RolloutGroup],
        batch: Sequence[RolloutGroup],
        zero_variance: Sequence[RolloutGroup],
        surplus: Sequence[RolloutGroup],
        stale: Sequence[RolloutGroup],
        limit_reached: bool,
    ) -> Self:
        """Count; `batch`, `zero_variance`, `surplus` and `stale` are what became of `generated` and the former surplus."""
        generated_ids = {group.group_id for group in generated}
        samples = [sample for group in generated for sample in group.samples]
        scores = [score for group in generated for score in group.scores]
        return cls(
            num_groups_generated=len(generated),
            num_groups_kept=len(batch),
            num_groups_zero_variance=len(zero_variance),
            num_groups_all_correct=sum(group.accuracy == 1 for group in generated),
            num_groups_all_wrong=sum(group.accuracy == 0 for group in generated),
            num_groups_surplus_used=sum(group.group_id not in generated_ids for group in batch),
            num_groups_surplus_kept=len(surplus),
            num_groups_stale=len(stale),
            num_tokens_generated=_num_tokens(generated),
            num_tokens_used=_num_tokens(batch),
            num_tokens_zero_variance=_num_tokens(zero_variance),
            num_tokens_surplus_kept=_num_tokens(surplus),
            num_tokens_stale=_num_tokens(stale),
            num_samples_scored_by_default=sum(score.error is not None for score in scores),
            accuracy=_mean([score.correct for score in scores]),
            reward=_mean([score.reward for score in scores]),
            response_length_tokens=_mean([len(sample.token_ids) for sample in samples]),
            truncated_fraction=_mean([sample.finish_reason == "length" for sample in samples]),
            limit_reached=limit_reached,
        )


def _num_tokens(groups: Sequence[RolloutGroup]) -> int:
    return sum(group.num_tokens for group in groups)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
