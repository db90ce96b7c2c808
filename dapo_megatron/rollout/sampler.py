"""Dynamic sampling: generate groups until enough of them carry a learning signal (arXiv 2503.14476, section 3.2).

A step is a row of waves. A wave is as many prompts as the missing groups need at the present acceptance rate. Its groups are
scored as they complete, while others still generate; what is taken is decided when the wave is done, in the order of group
ids. So the outcome is a function of seed, prompts and weights, and never of timing. Groups accepted beyond the need are the
surplus: the next step takes them first, unless their tokens are too old by then.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from dapo_megatron.algo.dynamic_sampling import has_learning_signal
from dapo_megatron.rollout.engine import Generator, SamplingParams
from dapo_megatron.rollout.groups import Scorer, generate_groups
from dapo_megatron.rollout.sampler_stats import SamplerStats
from dapo_megatron.types import EngineError, Prompt, RolloutGroup

logger = logging.getLogger(__name__)


class PromptSource(Protocol):
    """Prompts without end."""

    def next(self) -> Prompt:
        """The next prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerRules:
    """What decides which groups a step is made of; constant over a run."""

    num_samples_per_prompt: int
    params: SamplingParams
    seed: int
    dynamic_sampling: bool = True
    """False: every group is accepted."""
    max_over_sampling: float = 8.0
    """Groups generated for one step, in multiples of the groups asked for."""
    max_staleness: int = 1
    """How many weight versions old the oldest token of a surplus group may be."""


@dataclass(frozen=True, slots=True)
class SamplerState:
    """What a checkpoint must hold, besides the position of the prompts, for the run to go on exactly."""

    next_group_id: int = 0
    acceptance_rate: float = 1.0
    """Running share of generated groups that are accepted, in (0, 1]."""
    surplus: tuple[RolloutGroup, ...] = ()


@dataclass(frozen=True, slots=True)
class RolloutBatch:
    """The groups of one rollout step, by rising group id; fewer than asked for only where `stats.limit_reached`."""

    groups: tuple[RolloutGroup, ...]
    stats: SamplerStats


class Sampler:
    """Collects the groups of each rollout step from the engines.

    An error of an engine or of the scorer ends the step and leaves the sampler unusable: go on from a checkpoint.
    """

    def __init__(
        self,
        engines: Sequence[Generator],
        scorer: Scorer,
        prompts: PromptSource,
        rules: SamplerRules,
        state: SamplerState | None = None,
    ):
        """`state` None starts a run, else the sampler goes on where `state()` was taken."""
        state = state or SamplerState()
        self._engines, self._scorer, self._prompts, self._rules = tuple(engines), scorer, prompts, rules
        self._next_group_id = state.next_group_id
        self._acceptance_rate = state.acceptance_rate
        self._surplus = list(state.surplus)

    def state(self) -> SamplerState:
        """As it is between two steps."""
        return SamplerState(self._next_group_id, self._acceptance_rate, tuple(self._surplus))

    async def collect(self, num_groups: int) -> RolloutBatch:
        """`num_groups` groups that carry a signal or, at the limit of over-sampling, as many as there are (maybe none)."""
        accepted, stale = self._split_surplus()
        generated: list[RolloutGroup] = []
        zero_variance: list[RolloutGroup] = []
        limit = math.floor(self._rules.max_over_sampling * num_groups)
        while len(accepted) < num_groups and len(generated) < limit:
            wave = await self._generate(min(self._wave_size(num_groups - len(accepted)), limit - len(generated)))
            accepted_before = len(accepted)
            for group in wave:
                (accepted if self._accepts(group) else zero_variance).append(group)
            generated += wave
            self._remember(len(accepted) - accepted_before, len(wave), num_groups)

        batch, self._surplus = tuple(accepted[:num_groups]), accepted[num_groups:]
        if len(batch) < num_groups:
            logger.warning(
                f"The step has {len(batch)} of {num_groups} groups: too few of {len(generated)} generated ones (the limit of "
                f"rollout.max_over_sampling {self._rules.max_over_sampling:g}) have an accuracy between 0 and 1; "
                "use prompts that the model solves sometimes, or raise the limit."
            )
        stats = SamplerStats.of(
            generated=generated,
            batch=batch,
            zero_variance=zero_variance,
            surplus=self._surplus,
            stale=stale,
            limit_reached=len(batch) < num_groups,
        )
        return RolloutBatch(batch, stats)

    def _split_surplus(self) -> tuple[list[RolloutGroup], list[RolloutGroup]]:
        """Surplus groups that may still be trained on, and those that are too old."""
        versions = {engine.weight_version for engine in self._engines}
        if len(versions) != 1:
            raise EngineError(f"Engines hold weight versions {sorted(versions)}; send one version to all before collect().")
        oldest_allowed = versions.pop() - self._rules.max_staleness
        fresh = [group for group in self._surplus if group.oldest_weight_version >= oldest_allowed]
        stale = [group for group in self._surplus if group.oldest_weight_version < oldest_allowed]
        return fresh, stale

    def _wave_size(self, num_missing: int) -> int:
        return math.ceil(num_missing / self._acceptance_rate) if self._rules.dynamic_sampling else num_missing

    def _accepts(self, group: RolloutGroup) -> bool:
        return not self._rules.dynamic_sampling or has_learning_signal(group.accuracy)

    def _remember(self, num_accepted: int, num_generated: int, num_groups: int) -> None:
        """Blend a wave into the acceptance rate; what was known before weighs as much as `num_groups` groups."""
        rate = (num_groups * self._acceptance_rate + num_accepted) / (num_groups + num_generated)
        self._acceptance_rate = max(rate, 1 / self._rules.max_over_sampling)

    async def _generate(self, num_prompts: int) -> list[RolloutGroup]:
        first_id = self._next_group_id
        self._next_group_id += num_prompts
        prompts = {group_id: self._prompts.next() for group_id in range(first_id, self._next_group_id)}
        rules = self._rules
        return await generate_groups(self._engines, self._scorer, prompts, rules.num_samples_per_prompt, rules.params, rules.seed)
