"""Where the loop takes its rollouts from: collected when asked for, or begun before, while the actor trains (`train.rollout_lag`)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from dapo_megatron.rollout.sampler import RolloutBatch


@dataclass(frozen=True, slots=True)
class RolloutTimes:
    """Of one rollout: how long it took, and how long the loop waited for it."""

    seconds: float
    waited_seconds: float


class Rollouts:
    """One rollout at a time. `take` it; or `begin` it, go on with something else, and take it later."""

    def __init__(self, collect: Callable[[], Awaitable[RolloutBatch]], settled: RolloutBatch | None = None):
        """`settled` is the rollout that a checkpoint holds."""
        self._collect = collect
        self._under_way: asyncio.Task[RolloutBatch] | None = None
        self._settled = settled
        self._seconds = self._waited_seconds = 0.0
        self.times_of_taken = RolloutTimes(0.0, 0.0)

    def begin(self) -> None:
        """Collect the next rollout while the caller does something else; the engines are busy until `settle` or `take`."""
        assert self._under_way is None and self._settled is None, "the rollout before was not taken"
        self._under_way = asyncio.create_task(self._timed())

    async def settle(self) -> RolloutBatch | None:
        """Wait for the rollout that was begun, if there is one, and keep it: the engines are free then. Raises what collecting it raised."""
        start = time.perf_counter()
        if self._under_way is not None:
            try:
                self._settled = await self._under_way
            finally:  # a cancelled wait has given it up
                self._under_way = None
        self._waited_seconds += time.perf_counter() - start
        return self._settled

    @property
    def is_begun(self) -> bool:
        """Whether the next one is under way, or there already."""
        return self._under_way is not None or self._settled is not None

    async def take(self) -> RolloutBatch:
        """The rollout that was begun or, without one, the next, collected now."""
        if not self.is_begun:
            self.begin()
        rollout = await self.settle()
        assert rollout is not None
        self._settled = None
        self.times_of_taken = RolloutTimes(self._seconds, self._waited_seconds)
        self._seconds = self._waited_seconds = 0.0
        return rollout

    async def cancel(self) -> None:
        """Give up what is under way."""
        if self._under_way is not None:
            self._under_way.cancel()
            await asyncio.wait([self._under_way])

    async def _timed(self) -> RolloutBatch:
        start = time.perf_counter()
        rollout = await self._collect()
        self._seconds = time.perf_counter() - start
        return rollout
