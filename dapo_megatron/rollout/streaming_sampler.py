"""Dynamic sampling as a stream: prompts are submitted all the time, and the step ends with the group that fills it.

In flight are as many groups as the missing ones need at the running acceptance rate, and `in_flight_margin` more. A group is judged when its
last sample is scored; a dropped one is replaced at once. When the step is full, what still runs is aborted or, with `partial_rollout`,
held by its engine. The next step begins with those groups, before it takes new prompts: `partial_rollout` lets them go on after the tokens
they have, under the new weights; else the tokens are thrown away and the prompt is asked again, so that long responses lose tokens but
no prompt is lost.

Which groups a step is made of depends on how fast they come: a run is not reproducible bit by bit, unlike one in waves.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from dapo_megatron.rollout.engine import GenerateRequest, GenerateResult, Generator
from dapo_megatron.rollout.groups import Scorer, request_seed
from dapo_megatron.rollout.sampler import Sampler, UnfinishedGroup
from dapo_megatron.rollout.sampler_stats import StepLedger
from dapo_megatron.types import EngineError, RolloutGroup


class StreamingSampler(Sampler):
    """`rollout.sampler: streaming`."""

    async def _fill(self, step: StepLedger) -> None:
        stream = _Stream(self._engines, self._scorer, self._request)
        self._unfinished.sort(key=lambda group: not group.samples)  # the engines go on with these whether they are asked or not
        num_going_on = sum(bool(group.samples) for group in self._unfinished) if step.num_missing else 0
        try:
            async with asyncio.TaskGroup() as tasks:
                while True:
                    while step.num_submitted < step.limit and (
                        step.num_submitted < num_going_on or stream.num_in_flight < self._in_flight_target(step)
                    ):
                        step.num_submitted += 1
                        stream.submit(self._unfinished.pop(0) if self._unfinished else self._new_group(), tasks)
                    if not stream.num_in_flight:
                        return
                    self._book(await stream.next(), step)
                    if not step.num_missing:
                        await stream.stop(partial(self._may_go_on, step))
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None

    def _in_flight_target(self, step: StepLedger) -> int:
        return math.ceil(self._num_needed(step.num_missing) * (1 + self._rules.in_flight_margin))

    def _may_go_on(self, step: StepLedger, group: UnfinishedGroup) -> bool:
        """Whether the group, as it was submitted, may still be trained on in the next step, one weight version on."""
        oldest = group.oldest_weight_version
        if oldest is None:
            oldest = self._weight_version()
        return self._rules.partial_rollout and oldest > step.oldest_allowed

    def _book(self, outcome: _Outcome, step: StepLedger) -> None:
        sent, came_back = outcome.sent, outcome.came_back
        step.num_tokens_generated += came_back.num_tokens - sent.num_tokens + outcome.num_tokens_redrawn
        step.num_tokens_redrawn += outcome.num_tokens_redrawn
        if outcome.scored is not None:
            accepted_before = len(step.accepted)
            self._judge(outcome.scored, step)
            self._remember(len(step.accepted) - accepted_before, 1, step.num_wanted)
        elif self._rules.partial_rollout and came_back.num_tokens:
            self._unfinished.append(came_back)
        else:
            step.num_tokens_aborted += came_back.num_tokens
            self._unfinished.append(UnfinishedGroup(sent.group_id, sent.prompt))

    def _request(self, group: UnfinishedGroup) -> GenerateRequest:
        rules = self._rules
        return GenerateRequest(
            request_id=group.group_id,
            prompt_token_ids=group.prompt.token_ids,
            num_samples=rules.num_samples_per_prompt,
            seed=request_seed(rules.seed, group.group_id),
            params=rules.params,
            started=group.samples,
        )


@dataclass(frozen=True, slots=True)
class _Outcome:
    """A submitted group as it was sent and as it came back, and with its scores when it is complete."""

    sent: UnfinishedGroup
    came_back: UnfinishedGroup
    scored: RolloutGroup | None
    num_tokens_redrawn: int
    """As of `GenerateResult`."""


class _Stream:
    """Groups in flight over the engines; each goes to the engine that has the fewest."""

    def __init__(self, engines: Sequence[Generator], scorer: Scorer, request_of: Callable[[UnfinishedGroup], GenerateRequest]):
        self._engines, self._scorer, self._request_of = engines, scorer, request_of
        self._groups_of: list[dict[int, UnfinishedGroup]] = [{} for _ in engines]
        self._outcomes: asyncio.Queue[_Outcome] = asyncio.Queue()
        self._stopped = False

    @property
    def num_in_flight(self) -> int:
        """Groups submitted whose outcome was not taken."""
        return sum(map(len, self._groups_of))

    def submit(self, group: UnfinishedGroup, tasks: asyncio.TaskGroup) -> None:
        """Begin with a group; its first error ends the tasks."""
        place = min(range(len(self._engines)), key=lambda place: len(self._groups_of[place]))
        self._groups_of[place][group.group_id] = group
        tasks.create_task(self._run(group, self._engines[place]))

    async def next(self) -> _Outcome:
        """The next group that is complete and scored, or came back incomplete."""
        outcome = await self._outcomes.get()
        for groups in self._groups_of:
            groups.pop(outcome.sent.group_id, None)
        return outcome

    async def stop(self, may_go_on: Callable[[UnfinishedGroup], bool]) -> None:
        """End what is still in flight, for good or until it is submitted again; the outcomes follow."""
        if not self._stopped:
            self._stopped = True
            await asyncio.gather(*(self._stop(*place, may_go_on) for place in zip(self._engines, self._groups_of, strict=True)))

    async def _stop(
        self, engine: Generator, groups: Mapping[int, UnfinishedGroup], may_go_on: Callable[[UnfinishedGroup], bool]
    ) -> None:
        held = {group_id for group_id, group in groups.items() if may_go_on(group)}
        if aborted := groups.keys() - held:
            await engine.abort(aborted)  # first: an engine may be paused for those that it holds
        if held:
            await engine.hold(held)

    async def _run(self, group: UnfinishedGroup, engine: Generator) -> None:
        came_back, scored, num_tokens_redrawn = group, None, 0
        if not self._stopped:  # else it was submitted in the moment of the stop, and abort() would not know it
            result = await self._answer(group, engine)
            came_back = UnfinishedGroup(group.group_id, group.prompt, result.samples)
            num_tokens_redrawn = result.num_tokens_redrawn
            if result.is_complete:
                scores = await self._scorer.score([sample.text for sample in result.samples], group.prompt.answer)
                scored = RolloutGroup(group.group_id, group.prompt, result.samples, scores)
        self._outcomes.put_nowait(_Outcome(group, came_back, scored, num_tokens_redrawn))

    async def _answer(self, group: UnfinishedGroup, engine: Generator) -> GenerateResult:
        answers = [result async for result in engine.generate([self._request_of(group)])]
        if not answers:
            raise EngineError(f"The engines left out request {group.group_id}; look at their logs.")
        return answers[0]
