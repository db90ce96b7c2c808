"""Dynamic sampling in waves: the outcome is a function of seed, prompts and weights, and never of timing.

A wave is as many prompts as the missing groups need at the present acceptance rate. Its groups are scored as they complete, while
others still generate; what is taken is decided when the wave is done, in the order of group ids.
"""

from __future__ import annotations

from dapo_megatron.rollout.groups import generate_groups
from dapo_megatron.rollout.sampler import Sampler
from dapo_megatron.rollout.sampler_stats import StepLedger
from dapo_megatron.types import RolloutGroup


class WaveSampler(Sampler):
    """`rollout.sampler: waves`."""

    async def _fill(self, step: StepLedger) -> None:
        for unfinished in self._unfinished:  # of a run that streamed before
            step.num_tokens_aborted += unfinished.num_tokens
        self._unfinished.clear()
        while step.num_missing and len(step.judged) < step.limit:
            wave, num_tokens_redrawn = await self._generate(
                min(self._num_needed(step.num_missing), step.limit - len(step.judged))
            )
            accepted_before = len(step.accepted)
            for group in wave:
                self._judge(group, step)
                step.num_tokens_generated += group.num_tokens
            step.num_tokens_generated += num_tokens_redrawn
            step.num_tokens_redrawn += num_tokens_redrawn
            self._remember(len(step.accepted) - accepted_before, len(wave), step.num_wanted)

    async def _generate(self, num_prompts: int) -> tuple[list[RolloutGroup], int]:
        groups = [self._new_group() for _ in range(num_prompts)]
        prompts = {group.group_id: group.prompt for group in groups}
        rules = self._rules
        return await generate_groups(self._engines, self._scorer, prompts, rules.num_samples_per_prompt, rules.params, rules.seed)
