"""The SGLang servers of a run: which of them serve, how a lost one comes back, and how all of them get weights.

    serving ──(connection reset, no sign of health by the deadline)──> lost ──> started again ──> fresh
       ^                                                                                            │
       └──────────── the fleet's weight version, proven, from the actor ────────────────────────────┘

An actor that trains, or has trained, does not hold the fleet's version any more. While others serve, a fresh engine then waits for the
next update. When none serves nobody would ask for that update, as the loop waits for tokens: the fresh engine gets what the actor holds
once it has trained, and that is the version of the fleet from there on.

Engines that share devices with the actor take turns with it, in this order; none is started in the actor's turn:

    rollout ──> release KV cache and weights ──> the actor trains ──> take back weights ──> they are updated
            ──> take back KV cache ──> rollout

Engines with devices of their own may be paused instead, with the requests that they work on: their streams stay open, and what was sampled
goes on after the update. A paused server answers no look at its health: until it is to generate again, only a connection that
breaks, or a call that fails, tells that it is lost.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import Any, Protocol

from dapo_megatron.config.schema import SglangEngineConfig
from dapo_megatron.rollout.sglang_engine import SglangEngine
from dapo_megatron.types import EngineEndpoint, EngineError, EngineLostError, VersionGoneError

RETRY_SECONDS = 2.0
"""Between two attempts to bring an engine back."""
CALL_SECONDS = 60.0
"""Deadline of a short call."""
FAREWELL_SECONDS = 10.0
"""Deadline of the last calls to a server, which nothing depends on."""

logger = logging.getLogger(__name__)

Restart = Callable[[str], Awaitable[EngineEndpoint]]
"""Brings the named engine back, with weights of any version. EngineError when it fails."""


class WeightKeeper(Protocol):
    """The actor, as an engine sees it that has come back."""

    async def resync(self, endpoint: EngineEndpoint, version: int) -> None:
        """Bring this version to the engine and prove it. VersionGoneError when the actor does not hold it, EngineLostError when the engine fails."""

    async def renew(self, endpoint: EngineEndpoint) -> int:
        """Wait until the actor does not train, bring what it holds then and prove it; its version. Errors as of `resync`."""


class UpdateReport(Protocol):
    """What came of sending a version to several engines."""

    @property
    def failures(self) -> Mapping[str, str]:
        """Name of an engine that did not get it -> what happened."""


class State(Enum):
    """Of one life of an engine."""

    SERVING = "serving"
    FRESH = "started, without the weights of the fleet"
    LOST = "lost"


@dataclass(eq=False, slots=True)
class EngineLife:
    """An engine from its start to its loss. What comes back is another life, so that late words about this one do not touch it."""

    client: SglangEngine
    state: State = State.SERVING
    outstanding_tokens: float = 0.0
    """Estimate of what it still has to compute."""
    streams: set[asyncio.Task[None]] = field(default_factory=set)
    """Requests that it works on; cancelled when it is lost."""
    is_released: bool = False
    """Its memory is the actor's at the moment."""
    last_sign: float = 0.0
    """When it was last heard of, by time.monotonic."""

    @property
    def name(self) -> str:
        return self.client.endpoint.name

    @property
    def is_lost(self) -> bool:
        return self.state is State.LOST


class Fleet:
    """To be used in one event loop and closed there."""

    def __init__(
        self, endpoints: Sequence[EngineEndpoint], config: SglangEngineConfig, restart: Restart, keeper: WeightKeeper | None
    ):
        """`keeper` None: engines keep the weights they are started with."""
        self._config, self._restart, self._keeper = config, restart, keeper
        self._lives = {endpoint.name: EngineLife(SglangEngine(endpoint)) for endpoint in endpoints}
        self.weight_version = 0
        """Of all engines that serve."""
        self.num_lost = 0
        """Engines lost so far."""
        self.is_paused = False
        self._changed = asyncio.Event()
        self._updating = asyncio.Lock()
        self._pausing = asyncio.Lock()
        self._engines_turn = asyncio.Event()
        self._engines_turn.set()
        self._num_starting = 0
        self._watching = False
        self._watchers: dict[EngineLife, asyncio.Task[None]] = {}
        self._background: set[asyncio.Task[None]] = set()
        self._none_since: float | None = None
        self._last_loss: EngineError | None = None
        self._fatal: BaseException | None = None

    @property
    def lives(self) -> tuple[EngineLife, ...]:
        """Present ones, of all engines."""
        return tuple(self._lives.values())

    @property
    def serving(self) -> tuple[EngineLife, ...]:
        """Those that take requests now."""
        return tuple(life for life in self.lives if life.state is State.SERVING)

    @property
    def started(self) -> tuple[EngineLife, ...]:
        """Those that a weight update goes to: all that are not lost."""
        return tuple(life for life in self.lives if life.state is not State.LOST)

    async def close(self) -> None:
        """End what runs in the background and close the connections; an engine that is lost now stays so."""
        self._fatal = self._fatal or EngineError("the engines are closed; make a new router.")
        self.notify()
        streams = [stream for life in self.lives for stream in life.streams]
        await end([*self._background, *self._watchers.values(), *streams])
        if self.is_paused:  # a server of somebody else must not be left so
            await asyncio.gather(*map(self._part_from, self.serving))
        await asyncio.gather(*(life.client.close() for life in self.lives))

    def check(self) -> None:
        """Raises what went wrong in the background and ends the run: a wrong fingerprint, an actor that is gone."""
        if self._fatal is not None:
            raise self._fatal

    def notify(self) -> None:
        """Wake all that wait for a change."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def pause(self) -> None:
        """Stop generation everywhere, as `rollout.engine.pause_mode` says, until `resume`; requests and their streams stay."""
        async with self._pausing:
            if not self.is_paused:
                self.unwatch()
                self.is_paused = True
                mode = self._config.pause_mode
                await self._on_each(self.serving, lambda life: life.client.pause(mode, CALL_SECONDS))

    async def resume(self) -> None:
        """End a pause."""
        async with self._pausing:
            if self.is_paused:
                await self._on_each(self.serving, lambda life: life.client.resume(CALL_SECONDS))
                self.is_paused = False
                self.notify()

    async def wait_for_resume(self) -> None:
        """In a pause: until it may have ended, or `notify`."""
        await self._changed.wait()

    async def wait_for_change(self) -> None:
        """Until an engine changes its state, or `notify`. EngineError past the deadline without any engine that serves."""
        self.check()
        now = time.monotonic()
        if self._none_since is None:
            self._none_since = now
        deadline = self._config.restart_deadline_seconds
        try:
            async with asyncio.timeout(self._none_since + deadline - now):
                await self._changed.wait()
        except TimeoutError:
            raise EngineError(
                f"no engine could be brought back within rollout.engine.restart_deadline_seconds ({deadline:.0f}); "
                f"the last loss: {self._last_loss} (raise the deadline where a restart takes longer)"
            ) from self._last_loss

    def watch(self) -> None:
        """Look at the health of the engines that serve until `unwatch`."""
        self._watching = True
        for life in self.serving:
            self._begin_to_watch(life)

    def unwatch(self) -> None:
        """Nothing is in work: an engine that is lost now is noticed by the next update or request."""
        self._watching = False
        for watcher in self._watchers.values():
            watcher.cancel()
        self._watchers.clear()

    def lose(self, life: EngineLife, error: EngineLostError) -> None:
        """Take it out and begin to bring it back; the second to notice has nothing to do."""
        if life.state is State.LOST:
            return
        delay = RETRY_SECONDS if life.state is State.FRESH else 0.0
        life.state, self._last_loss = State.LOST, error
        self.num_lost += 1
        for stream in life.streams:
            stream.cancel()
        if self._fatal is None:
            logger.warning(f"{error}; it is started again, {len(self.serving)} other engines serve")
            self._in_background(self._bring_back(life, delay))
        self.notify()

    async def release_memory(self) -> None:
        """Leave the GPUs to the actor until the next update.

        Nothing happens on CPUs, which have nothing to release, nor with servers of somebody else, whose GPUs are not the actor's.
        """
        if self._config.engine_urls or all(life.client.endpoint.device != "cuda" for life in self.lives):
            return
        self._engines_turn.clear()
        while self._num_starting:  # a server takes its memory while it starts
            await self._changed.wait()
        async with self._updating:
            await self._on_each(self.started, self._release)

    async def update_weights[Report: UpdateReport](
        self, version: int, push: Callable[[Sequence[EngineEndpoint]], Awaitable[Report]]
    ) -> Report:
        """Bring `version` to all engines by `push`, which proves it; one that fails is started again and gets it then.

        EngineError when an engine then names another version, or when none is left and none came back in time.
        """
        self._engines_turn.set()
        async with self._updating:
            while True:
                await self._on_each(await self._reachable(), self._take_back_weights)
                lives = await self._reachable()
                report = await push([life.client.endpoint for life in lives])
                self.weight_version = version
                await self._on_each(lives, partial(self._finish_update, report.failures))
                if self.serving:
                    return report

    async def _reachable(self) -> Sequence[EngineLife]:
        """Engines that are not lost, awaited if there is none."""
        self.check()
        while not (lives := self.started):
            await self.wait_for_change()
        return lives

    async def _on_each(self, lives: Sequence[EngineLife], call: Callable[[EngineLife], Awaitable[None]]) -> None:
        """At the same time; an engine that is lost is noted, not raised."""

        async def one(life: EngineLife) -> None:
            try:
                await call(life)
            except EngineLostError as error:
                self.lose(life, error)

        await asyncio.gather(*map(one, lives))

    async def _release(self, life: EngineLife) -> None:
        await life.client.flush_cache(CALL_SECONDS)  # waits for what an abort has left running
        await life.client.release_memory(["kv_cache", "weights"], CALL_SECONDS)
        life.is_released = True

    async def _take_back_weights(self, life: EngineLife) -> None:
        if life.is_released:
            await life.client.resume_memory(["weights"], CALL_SECONDS)

    async def _finish_update(self, failures: Mapping[str, str], life: EngineLife) -> None:
        if life.name in failures:
            version = self.weight_version
            raise EngineLostError(f"{life.name} did not take weight version {version}: {failures[life.name]}", life.name)
        if life.is_released:
            await life.client.resume_memory(["kv_cache"], CALL_SECONDS)
            life.is_released = False
        await self._serve(life, self.weight_version)

    async def _bring_back(self, lost: EngineLife, delay: float) -> None:
        """Start it again, give it weights, let it serve."""
        await lost.client.close()
        await asyncio.sleep(delay)
        endpoint = None
        while endpoint is None:
            await self._engines_turn.wait()
            self._num_starting += 1
            try:
                endpoint = await self._restart(lost.name)
            except EngineError as error:
                logger.warning(f"{lost.name} does not come back: {error}")
                self._last_loss = error
            finally:
                self._num_starting -= 1
                self.notify()
            if endpoint is None:
                await asyncio.sleep(RETRY_SECONDS)
        life = self._lives[lost.name] = EngineLife(SglangEngine(endpoint), State.FRESH)
        self.notify()
        waits = False
        while life.state is State.FRESH:
            changed = self._changed
            async with self._updating:
                if life.state is State.FRESH and not life.is_released:  # else an update has been here before, or will be
                    await self._on_each([life], self._bring_weights)
            if life.state is State.FRESH:
                if not waits:
                    logger.warning(f"{life.name} is up again and serves after the next weight update")
                waits = True
                await changed.wait()

    async def _bring_weights(self, life: EngineLife) -> None:
        """Those of the fleet; where that is not possible, newer ones for the whole fleet, or none yet."""
        version = self.weight_version
        if self._keeper is not None:
            try:
                await self._keeper.resync(life.client.endpoint, version)
            except VersionGoneError:
                if self.serving:
                    return
                version = await self._keeper.renew(life.client.endpoint)
        await self._serve(life, version)

    async def _serve(self, life: EngineLife, version: int) -> None:
        """Let it, and all others, serve with this version once it names it. Prefixes computed with older weights are dropped."""
        held = await life.client.weight_version(CALL_SECONDS)
        if held != version:
            raise EngineError(f"{life.name} holds weight version {held} after an update to version {version}; look at its log.")
        if not (self.is_paused and self._config.pause_mode == "in_place"):  # the cache is in use, and prefixes have keys
            await life.client.flush_cache(CALL_SECONDS, waits=not self.is_paused)
        if life.state is State.LOST:
            return
        if life.state is State.FRESH:
            logger.warning(f"{life.name} serves again, with weight version {version}")
        life.state, self.weight_version, self._none_since = State.SERVING, version, None
        if self._watching:
            self._begin_to_watch(life)
        self.notify()

    async def _part_from(self, life: EngineLife) -> None:
        with suppress(EngineError):
            await life.client.resume(FAREWELL_SECONDS)

    def _begin_to_watch(self, life: EngineLife) -> None:
        if life not in self._watchers:
            watcher = self._watchers[life] = asyncio.create_task(self._watch(life))
            watcher.add_done_callback(self._note_failure)

    async def _watch(self, life: EngineLife) -> None:
        """Until it is lost; it may be slow to answer, but not silent past the deadline."""
        interval, deadline = self._config.health_interval_seconds, self._config.health_deadline_seconds
        life.last_sign = time.monotonic()
        while life.state is State.SERVING:
            await asyncio.sleep(interval)
            try:
                if await life.client.is_healthy(max(interval, deadline / 2)):
                    life.last_sign = time.monotonic()
            except EngineLostError as error:
                self.lose(life, error)
            if time.monotonic() - life.last_sign > deadline:
                words = f"{life.name} gave no sign of health for rollout.engine.health_deadline_seconds ({deadline:g})"
                self.lose(life, EngineLostError(words, life.name))
        self._watchers.pop(life, None)

    def _in_background(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        task.add_done_callback(self._note_failure)

    def _note_failure(self, task: asyncio.Future[None]) -> None:
        """What is no loss of an engine ends the run at the next request."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fatal = self._fatal or error
            self.notify()


async def end(tasks: Collection[asyncio.Future[Any]]) -> None:
    """Cancel what is not done and wait for it; errors are those of tasks that nobody waits for any more."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
