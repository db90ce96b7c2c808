"""Which weights the actor's ranks hold, and bringing them to a server that comes back between two updates."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager

from dapo_megatron.types import EngineEndpoint, EngineError, EngineLostError, VersionGoneError
from dapo_megatron.weights.transports.records import PushReport


class HeldWeights:
    """Implements `WeightKeeper` over the actor's own push."""

    def __init__(self, push: Callable[[int, Sequence[EngineEndpoint]], Awaitable[PushReport]]):
        self._push = push
        self._version: int | None = None  # None: none that may be sent
        self._is_kept_back = False
        self._is_idle = asyncio.Event()
        self._is_idle.set()

    def are(self, version: int) -> None:
        """What the ranks hold is sent as this version from here on. To be said before sending: training may begin before that ends."""
        self._version = version

    def are_gone(self) -> None:
        """The ranks hold nothing any more."""
        self._version = None

    def keep_back(self) -> None:
        """Nothing is sent from here on: the actor takes all of its devices back (`actor.offload`)."""
        self._is_kept_back = True
        self._is_idle.clear()

    def let_go(self) -> None:
        """The actor has made room for the engines. Not to be said while it trains."""
        self._is_kept_back = False
        self._is_idle.set()

    @contextmanager
    def while_training(self, rollout_step: int) -> Iterator[None]:
        """Around the training of a step, which leaves the version after the step's own, or nothing when it fails."""
        self._version = None
        self._is_idle.clear()
        try:
            yield
            self._version = rollout_step + 1
        finally:
            if not self._is_kept_back or self._version is None:
                self._is_idle.set()

    async def resync(self, endpoint: EngineEndpoint, version: int) -> None:
        """See `WeightKeeper.resync`."""
        if version != self._version or self._is_kept_back:
            raise VersionGoneError(f"{endpoint.name} cannot get weight version {version}: the actor does not hold it any more")
        failures = (await self._push(version, [endpoint])).failures
        if failures:
            raise EngineLostError(failures[endpoint.name], endpoint.name)

    async def renew(self, endpoint: EngineEndpoint) -> int:
        """See `WeightKeeper.renew`. EngineError when the ranks hold nothing any more."""
        await self._is_idle.wait()
        version = self._version
        if version is None:
            raise EngineError(f"{endpoint.name} was lost and cannot get its weights back: the actor holds none any more")
        await self.resync(endpoint, version)
        return version
