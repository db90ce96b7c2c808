"""Where the groups and tokens of one rollout step came from and went."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from dapo_megatron.types import RolloutGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerStats:
    """Every group that was judged and every response token of a step is accounted for:

    groups: generated + surplus kept by the step before = kept (used) + zero variance + out of band + stale + surplus kept;
    tokens: generated + surplus and unfinished kept by the step before
            = used + zero variance + out of band + stale + aborted + redrawn + surplus kept + unfinished kept.

    A token is generated when it has come from its engine; what a lost engine drew and did not send, nobody knows of.
    Means are over all groups *judged* in this step, before the filter; None when the surplus alone filled the step.
    """

    num_groups_generated: int
    """Groups judged in this step."""
    num_groups_kept: int
    """Groups of the batch."""
    num_groups_zero_variance: int
    """Judged groups dropped for an accuracy of 0 or 1."""
    num_groups_out_of_band: int
    """Judged groups with signal, dropped for an accuracy outside algo.accuracy_min .. accuracy_max."""
    num_groups_all_correct: int
    """Judged groups of accuracy 1, dropped or not."""
    num_groups_all_wrong: int
    """Judged groups of accuracy 0, dropped or not."""
    num_groups_surplus_used: int
    """Groups of the batch that an earlier step generated."""
    num_groups_surplus_kept: int
    """Accepted groups left for the next step."""
    num_groups_stale: int
    """Surplus groups dropped for their age."""
    num_groups_unfinished: int
    """Groups that the next step goes on with: with the tokens they have, or from the prompt."""
    num_tokens_generated: int
    """Come in this step or, of requests that were held, since the step before ended; whatever became of them."""
    num_tokens_used: int
    num_tokens_zero_variance: int
    num_tokens_out_of_band: int
    num_tokens_surplus_kept: int
    num_tokens_stale: int
    """Of surplus and unfinished groups, dropped for their age."""
    num_tokens_aborted: int
    """Of groups that were unfinished when the step was full, thrown away."""
    num_tokens_unfinished: int
    """Of groups that were unfinished when the step was full, kept."""
    num_tokens_redrawn: int
    """Thrown away when their engine was lost, and drawn again: of samples that began again under newer weights, and last tokens whose
    experts it had not told."""
    num_samples_scored_by_default: int
    """Judged samples on which the reward function gave no verdict of its own."""
    accuracy: float | None
    """Share of correct samples."""
    reward: float | None
    response_length_tokens: float | None
    truncated_fraction: float | None
    """Share of samples that ended at max_response_tokens."""
    limit_reached: bool
    """Whether rollout.max_over_sampling ended the step before it was full."""


@dataclass(slots=True, kw_only=True)
class StepLedger:
    """What becomes of groups and tokens while a step is collected."""

    num_wanted: int
    limit: int
    """Groups that may be submitted."""
    oldest_allowed: int
    """Weight version of the oldest token that may be trained on."""
    accepted: list[RolloutGroup] = field(default_factory=list)
    """In the order of judgement, the surplus of the step before first."""
    judged: list[RolloutGroup] = field(default_factory=list)
    zero_variance: list[RolloutGroup] = field(default_factory=list)
    out_of_band: list[RolloutGroup] = field(default_factory=list)
    stale: list[RolloutGroup] = field(default_factory=list)
    num_submitted: int = 0
    num_tokens_generated: int = 0
    num_tokens_aborted: int = 0
    num_tokens_stale_unfinished: int = 0
    num_tokens_redrawn: int = 0

    @property
    def num_missing(self) -> int:
        """Groups to be accepted yet."""
        return max(0, self.num_wanted - len(self.accepted))

    def stats(
        self, batch: Sequence[RolloutGroup], surplus: Sequence[RolloutGroup], unfinished_tokens: Sequence[int]
    ) -> SamplerStats:
        """Of the finished step; `unfinished_tokens` has the tokens of each group that the next step goes on with."""
        judged_ids = {group.group_id for group in self.judged}
        samples = [sample for group in self.judged for sample in group.samples]
        scores = [score for group in self.judged for score in group.scores]
        return SamplerStats(
            num_groups_generated=len(self.judged),
            num_groups_kept=len(batch),
            num_groups_zero_variance=len(self.zero_variance),
            num_groups_out_of_band=len(self.out_of_band),
            num_groups_all_correct=sum(group.accuracy == 1 for group in self.judged),
            num_groups_all_wrong=sum(group.accuracy == 0 for group in self.judged),
            num_groups_surplus_used=sum(group.group_id not in judged_ids for group in batch),
            num_groups_surplus_kept=len(surplus),
            num_groups_stale=len(self.stale),
            num_groups_unfinished=len(unfinished_tokens),
            num_tokens_generated=self.num_tokens_generated,
            num_tokens_used=_num_tokens(batch),
            num_tokens_zero_variance=_num_tokens(self.zero_variance),
            num_tokens_out_of_band=_num_tokens(self.out_of_band),
            num_tokens_surplus_kept=_num_tokens(surplus),
            num_tokens_stale=_num_tokens(self.stale) + self.num_tokens_stale_unfinished,
            num_tokens_aborted=self.num_tokens_aborted,
            num_tokens_unfinished=sum(unfinished_tokens),
            num_tokens_redrawn=self.num_tokens_redrawn,
            num_samples_scored_by_default=sum(score.error is not None for score in scores),
            accuracy=_mean([score.correct for score in scores]),
            reward=_mean([score.reward for score in scores]),
            response_length_tokens=_mean([len(sample.token_ids) for sample in samples]),
            truncated_fraction=_mean([sample.finish_reason == "length" for sample in samples]),
            limit_reached=len(batch) < self.num_wanted,
        )


def _num_tokens(groups: Sequence[RolloutGroup]) -> int:
    return sum(group.num_tokens for group in groups)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
