"""Dynamic sampling: generate groups until enough of them carry a learning signal (arXiv 2503.14476, section 3.2).

What all samplers share: which groups are accepted, what is held over to the next step, and the books. How groups come is
`wave_sampler.py` (a function of seed, prompts and weights, never of timing) or `streaming_sampler.py` (as fast as the engines can).

Groups accepted beyond the need are the surplus: the next step takes them first, unless their tokens are too old by then.
"""

from __future__ import annotations

import asyncio
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from dapo_megatron.algo.dynamic_sampling import has_learning_signal, is_in_band
from dapo_megatron.rollout.engine import Generator, SamplingParams
from dapo_megatron.rollout.groups import Scorer
from dapo_megatron.rollout.sampler_stats import SamplerStats, StepLedger
from dapo_megatron.types import EngineError, Prompt, RolloutGroup, Sample, SignalError

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
    accuracy_min: float = 0.0
    accuracy_max: float = 1.0
    """Bounds, inclusive, on the accuracy of accepted groups, besides 0 < accuracy < 1."""
    max_over_sampling: float = 8.0
    """Groups submitted for one step, in multiples of the groups asked for."""
    on_limit: Literal["smaller_step", "error"] = "smaller_step"
    """What follows when that limit ends a step before it is full."""
    max_staleness: int = 1
    """How many weight versions older than the trained ones the oldest token of a group may be."""
    lag: int = 0
    """Weight versions between those that sample and those that are trained."""
    in_flight_margin: float = 0.0
    """Share of groups in flight beyond what the acceptance rate calls for; streaming only."""
    partial_rollout: bool = False
    """Whether a group that is unfinished when the step is full keeps its tokens for the next one; streaming only."""


@dataclass(frozen=True, slots=True)
class UnfinishedGroup:
    """A prompt that was submitted and not judged; `samples`, where there are any, hold what was generated of each sample."""

    group_id: int
    prompt: Prompt
    samples: tuple[Sample, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Response tokens so far."""
        return sum(len(sample.token_ids) for sample in self.samples)

    @property
    def oldest_weight_version(self) -> int | None:
        """The oldest weights that produced any token; None without tokens."""
        return min((int(s.weight_versions.min()) for s in self.samples if len(s.weight_versions)), default=None)


@dataclass(frozen=True, slots=True)
class SamplerState:
    """What a checkpoint must hold, besides the position of the prompts, for the run to go on exactly."""

    next_group_id: int = 0
    acceptance_rate: float = 1.0
    """Running share of generated groups that are accepted, in (0, 1]."""
    surplus: tuple[RolloutGroup, ...] = ()
    unfinished: tuple[UnfinishedGroup, ...] = ()
    """By rising group id; the next step goes on with them before it takes new prompts."""


@dataclass(frozen=True, slots=True)
class RolloutBatch:
    """The groups of one rollout step, by rising group id; fewer than asked for only where `stats.limit_reached`."""

    groups: tuple[RolloutGroup, ...]
    stats: SamplerStats


class Sampler(ABC):
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
        self._unfinished = list(state.unfinished)

    def state(self) -> SamplerState:
        """As it is between two steps."""
        return SamplerState(self._next_group_id, self._acceptance_rate, tuple(self._surplus), tuple(self._unfinished))

    async def collect(self, num_groups: int) -> RolloutBatch:
        """`num_groups` groups that carry a signal or, at the limit of over-sampling, as many as there are (maybe none).

        Raises SignalError there with `on_limit: error`.
        """
        limit = math.floor(self._rules.max_over_sampling * num_groups)
        oldest_allowed = self._weight_version() + self._rules.lag - self._rules.max_staleness
        step = StepLedger(num_wanted=num_groups, limit=limit, oldest_allowed=oldest_allowed)
        await self._drop_stale(step)
        await self._fill(step)
        batch, self._surplus = step.accepted[:num_groups], step.accepted[num_groups:]
        if len(batch) < num_groups:
            self._at_limit(step)
        batch.sort(key=lambda group: group.group_id)
        self._unfinished.sort(key=lambda group: group.group_id)
        stats = step.stats(batch, self._surplus, [group.num_tokens for group in self._unfinished])
        return RolloutBatch(tuple(batch), stats)

    @abstractmethod
    async def _fill(self, step: StepLedger) -> None:
        """Generate and judge groups until the step has what it wants, or has submitted as many as it may."""

    def _weight_version(self) -> int:
        versions = {engine.weight_version for engine in self._engines}
        if len(versions) != 1:
            raise EngineError(f"Engines hold weight versions {sorted(versions)}; send one version to all before collect().")
        return versions.pop()

    async def _drop_stale(self, step: StepLedger) -> None:
        """Take the surplus that may still be trained on; an unfinished group with tokens that may not starts again.

        So does one that a run with `partial_rollout` has left to a run without.
        """
        for group in self._surplus:
            (step.accepted if group.oldest_weight_version >= step.oldest_allowed else step.stale).append(group)
        dropped = set()
        for place, unfinished in enumerate(self._unfinished):
            oldest = unfinished.oldest_weight_version
            if oldest is None:
                continue
            if not self._rules.partial_rollout:
                step.num_tokens_aborted += unfinished.num_tokens
            elif oldest < step.oldest_allowed:
                step.num_tokens_stale_unfinished += unfinished.num_tokens
            else:
                continue
            self._unfinished[place] = replace(unfinished, samples=())
            dropped.add(unfinished.group_id)
        if dropped:
            came_since = sum(await asyncio.gather(*(engine.let_go(dropped) for engine in self._engines)))
            step.num_tokens_generated += came_since
            step.num_tokens_stale_unfinished += came_since

    def _judge(self, group: RolloutGroup, step: StepLedger) -> None:
        rules = self._rules
        step.judged.append(group)
        if not rules.dynamic_sampling:
            step.accepted.append(group)
        elif not has_learning_signal(group.accuracy):
            step.zero_variance.append(group)
        elif not is_in_band(group.accuracy, rules.accuracy_min, rules.accuracy_max):
            step.out_of_band.append(group)
        else:
            step.accepted.append(group)

    def _num_needed(self, num_missing: int) -> int:
        """Groups to generate so that, at the present rate, so many are accepted."""
        return math.ceil(num_missing / self._acceptance_rate) if self._rules.dynamic_sampling else num_missing

    def _remember(self, num_accepted: int, num_judged: int, num_groups: int) -> None:
        """Blend what was judged into the acceptance rate; what was known before weighs as much as `num_groups` groups."""
        rate = (num_groups * self._acceptance_rate + num_accepted) / (num_groups + num_judged)
        self._acceptance_rate = max(rate, 1 / self._rules.max_over_sampling)

    def _new_group(self) -> UnfinishedGroup:
        self._next_group_id += 1
        return UnfinishedGroup(self._next_group_id - 1, self._prompts.next())

    def _at_limit(self, step: StepLedger) -> None:
        rules = self._rules
        banded = (rules.accuracy_min, rules.accuracy_max) != (0, 1)
        wanted = f"within {rules.accuracy_min:g} .. {rules.accuracy_max:g} and " if banded else ""
        problem = (
            f"The step has {len(step.accepted)} of {step.num_wanted} groups: too few of {len(step.judged)} generated ones (the limit of "
            f"rollout.max_over_sampling {rules.max_over_sampling:g}) have an accuracy {wanted}between 0 and 1; "
            "use prompts that the model solves sometimes, or raise the limit"
        )
        if rules.on_limit == "error":
            raise SignalError(f"{problem}, or train on smaller steps with rollout.on_limit smaller_step.")
        logger.warning(f"{problem}.")
