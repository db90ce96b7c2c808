"""Many SGLang servers as one engine: routing, and what happens when one of them is lost.

    request (a prompt and its G samples) ──> the engine with the fewest outstanding tokens
        the engine is lost (connection reset, no sign of health by the deadline)
            ├─> the request goes to another one, each sample after the tokens that have arrived
            └─> the engine is started again ──> current weights, proven ──> serves

Engines that share devices with the actor take turns with it, in this order:

    rollout ──> release KV cache and weights ──> the actor trains ──> take back weights ──> they are updated
            ──> take back KV cache ──> rollout

A group stays together, so that its prompt is computed once. Engines are watched while requests run. Sampling under SGLang is not
reproducible bit by bit: `GenerateRequest.seed` has no effect.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

from dapo_megatron.config.schema import SglangEngineConfig
from dapo_megatron.rollout.engine import GenerateRequest, GenerateResult
from dapo_megatron.rollout.partial_sample import PartialSample
from dapo_megatron.rollout.sglang_engine import Piece, SglangEngine
from dapo_megatron.types import DapoMegatronError, EngineEndpoint, EngineError, EngineLostError

ABORT_POLL_SECONDS = 0.5
"""An abort that overtakes its request has no effect on the server, so it is repeated."""
RETRY_SECONDS = 2.0
"""Between two attempts to bring an engine back."""
MAX_ABORTS_BY_ENGINE = 3
"""How often an engine may end a request that nobody aborted."""
CALL_SECONDS = 60.0
"""Deadline of a short call."""

logger = logging.getLogger(__name__)

Restart = Callable[[str], Awaitable[EngineEndpoint]]
"""Brings the named engine back, with weights of any version. EngineError when it fails."""
Resync = Callable[[EngineEndpoint, int], Awaitable[None]]
"""Brings this weight version to an engine and proves it; EngineError when the actor holds it no more."""
Decode = Callable[[list[list[int]]], list[str]]
"""Token ids to texts, special tokens left out."""


class UpdateReport(Protocol):
    """What came of sending a version to several engines."""

    @property
    def failures(self) -> Mapping[str, str]:
        """Name of an engine that did not get it -> what happened."""


class _State(Enum):
    SERVING = "serving"
    FRESH = "started, without the current weights"
    LOST = "lost"


@dataclass(eq=False, slots=True)
class _Routed:
    """An engine and what the router knows of it."""

    client: SglangEngine
    state: _State = _State.SERVING
    outstanding_tokens: float = 0.0
    """Estimate of what it still has to compute."""
    is_released: bool = False
    """Its memory is the actor's at the moment."""
    last_sign: float = 0.0
    """When it was last heard of, by time.monotonic."""
    loss: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when it is lost; a new one for its next life."""

    @property
    def name(self) -> str:
        return self.client.endpoint.name


@dataclass(eq=False, slots=True)
class _Flight:
    """A request in work. `rids` are those of the current attempt, by sample."""

    request: GenerateRequest
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    engine: _Routed | None = None
    rids: tuple[str, ...] = ()
    aborted: bool = False


class Router:
    """Implements `Generator` over SGLang servers. To be used in one event loop and closed there."""

    def __init__(
        self,
        endpoints: Sequence[EngineEndpoint],
        config: SglangEngineConfig,
        decode: Decode,
        *,
        restart: Restart,
        resync: Resync | None = None,
    ):
        """`resync` None: the engines keep the weights they were started with."""
        self._config, self._decode, self._restart, self.resync = config, decode, restart, resync
        self._engines = [_Routed(self._client(endpoint)) for endpoint in endpoints]
        self._weight_version = 0
        self._flights: dict[int, _Flight] = {}
        self._names = itertools.count()
        self._prefix = secrets.token_hex(4)
        self._background: set[asyncio.Task[None]] = set()
        self._watchers: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._updating = asyncio.Lock()
        self._none_since: float | None = None
        self._last_loss: EngineError | None = None
        self._fatal: BaseException | None = None
        self._mean_response_tokens: float | None = None
        self.num_engines_lost = 0
        """Over the life of the router."""

    @property
    def weight_version(self) -> int:
        """Of the weights that tokens are drawn from."""
        return self._weight_version

    @weight_version.setter
    def weight_version(self, version: int) -> None:
        self._weight_version = version

    @property
    def endpoints(self) -> tuple[EngineEndpoint, ...]:
        """Of the engines that a weight update goes to: all that are not lost."""
        return tuple(engine.client.endpoint for engine in self._engines if engine.state is not _State.LOST)

    @property
    def serving(self) -> tuple[EngineEndpoint, ...]:
        """Of the engines that take requests now."""
        return tuple(engine.client.endpoint for engine in self._engines if engine.state is _State.SERVING)

    def generate(self, requests: Sequence[GenerateRequest]) -> AsyncGenerator[GenerateResult, None]:
        """See `Generator.generate`. EngineError when no engine could be brought back within the deadline."""
        for request in requests:
            if request.request_id in self._flights:
                raise EngineError(f"request {request.request_id} is running already; ids must differ among running requests.")
        flights = {request.request_id: _Flight(request) for request in requests}
        self._flights |= flights  # at once, so that abort() right after this call finds them
        return self._generate(tuple(flights.values()))

    async def _generate(self, flights: Sequence[_Flight]) -> AsyncGenerator[GenerateResult, None]:
        pending = {asyncio.ensure_future(self._complete(flight)) for flight in flights}
        try:
            while pending:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    yield task.result()
        finally:
            await _end(pending)
            for flight in flights:  # a task that was cancelled before it began has not taken its own out
                self._land(flight)

    async def abort(self, request_ids: Collection[int]) -> None:
        """See `Generator.abort`; returns when the requests have ended."""
        flights = [flight for request_id in request_ids if (flight := self._flights.get(request_id))]
        for flight in flights:
            flight.aborted = True
        self._notify()
        while flights := [flight for flight in flights if not flight.ended.is_set()]:
            await asyncio.gather(*(self._abort_on(engine, flights) for engine in self._engines))
            waiting = [asyncio.ensure_future(flight.ended.wait()) for flight in flights]
            try:
                await asyncio.wait(waiting, timeout=ABORT_POLL_SECONDS)
            finally:
                await _end(waiting)

    async def release_memory(self) -> None:
        """Leave the GPUs to the actor until the next `update_weights`; nothing happens on CPUs, which have nothing to release.

        EngineError while a request is in work.
        """
        if self._flights:
            raise EngineError(f"{len(self._flights)} requests are in work; memory is released between rollouts only.")
        on_gpus = [engine for engine in self._engines if engine.client.endpoint.device == "cuda"]
        await self._on_each([engine for engine in on_gpus if engine.state is _State.SERVING], self._release)

    async def update_weights[Report: UpdateReport](
        self, version: int, push: Callable[[Sequence[EngineEndpoint]], Awaitable[Report]]
    ) -> Report:
        """Bring `version` to all engines by `push`, which proves it; one that fails is started again and gets it then.

        EngineError when an engine then names another version, or when none is left and none came back in time.
        """
        async with self._updating:
            while True:
                await self._on_each(await self._reachable(), self._take_back_weights)
                engines = await self._reachable()
                report = await push([engine.client.endpoint for engine in engines])
                self._weight_version = version
                updated = await asyncio.gather(*(self._has_update(engine, report.failures, version) for engine in engines))
                if any(updated):
                    return report

    async def _on_each(self, engines: Sequence[_Routed], call: Callable[[_Routed], Awaitable[None]]) -> None:
        """At the same time; an engine that is lost is noted, not raised."""

        async def one(engine: _Routed) -> None:
            try:
                await call(engine)
            except EngineLostError as error:
                self._lose(engine, error)

        await asyncio.gather(*map(one, engines))

    async def _release(self, engine: _Routed) -> None:
        await engine.client.flush_cache(CALL_SECONDS)  # waits for what an abort has left running
        await engine.client.release_memory(["kv_cache", "weights"], CALL_SECONDS)
        engine.is_released = True

    async def _take_back_weights(self, engine: _Routed) -> None:
        if engine.is_released:
            await engine.client.resume_memory(["weights"], CALL_SECONDS)

    async def _take_back_cache(self, engine: _Routed) -> None:
        if engine.is_released:
            await engine.client.resume_memory(["kv_cache"], CALL_SECONDS)
            engine.is_released = False

    async def _has_update(self, engine: _Routed, failures: Mapping[str, str], version: int) -> bool:
        """Whether the engine holds the version; then it serves, else it is lost."""
        try:
            if engine.name in failures:
                raise EngineLostError(
                    f"{engine.name} did not take weight version {version}: {failures[engine.name]}", engine.name
                )
            await self._take_back_cache(engine)
            await self._take_on(engine, version)
        except EngineLostError as error:
            self._lose(engine, error)
            return False
        self._serve(engine)
        return True

    async def close(self) -> None:
        """End what runs in the background and close the connections."""
        await _end([*self._background, *self._watchers])
        self._background.clear()
        self._watchers.clear()
        await asyncio.gather(*(engine.client.close() for engine in self._engines))

    def _client(self, endpoint: EngineEndpoint) -> SglangEngine:
        return SglangEngine(endpoint)

    async def _complete(self, flight: _Flight) -> GenerateResult:
        """One request to its end, over as many engines as it takes."""
        request, num_aborts = flight.request, 0
        partials = [PartialSample(sample) for sample in request.started or (None,) * request.num_samples]
        self._watch_all()
        try:
            while not flight.aborted and (unfinished := [partial for partial in partials if not partial.is_finished]):
                engine = await self._pick(flight)
                if engine is None:
                    break
                num_aborts += await self._attempt(flight, engine, unfinished)
                if num_aborts > MAX_ABORTS_BY_ENGINE:
                    raise EngineError(f"{engine.name} ended request {request.request_id} {num_aborts} times; look at its log.")
                for partial in partials:
                    partial.finish_if_complete(request.params)
            texts = await asyncio.to_thread(self._decode, [partial.token_ids for partial in partials])
            self._remember(partials)
            samples = tuple(partial.sample(text) for partial, text in zip(partials, texts, strict=True))
            return GenerateResult(request.request_id, samples)
        finally:
            self._land(flight)

    def _land(self, flight: _Flight) -> None:
        """The request is no longer in work; engines are watched only while one is."""
        if self._flights.get(flight.request.request_id) is flight:
            del self._flights[flight.request.request_id]
        flight.ended.set()
        if not self._flights:
            for watcher in self._watchers:
                watcher.cancel()
            self._watchers.clear()

    async def _attempt(self, flight: _Flight, engine: _Routed, partials: Sequence[PartialSample]) -> int:
        """Let one engine go on with the samples; 1 when it ended one that nobody aborted. A lost engine is noted, not raised."""
        request = flight.request
        number = next(self._names)
        # The server takes an id for the prefix of others: no id may begin another one.
        flight.rids = tuple(f"{self._prefix}-{number}-{index}-" for index in range(len(partials)))
        continuations = [
            partial.continuation(rid, request.prompt_token_ids, request.params)
            for rid, partial in zip(flight.rids, partials, strict=True)
        ]
        expected = self._expected_tokens(request, partials)
        reasons: list[str] = []

        def take(index: int, piece: Piece) -> None:
            engine.last_sign = time.monotonic()
            if any(version != self._weight_version for version in piece.weight_versions):
                raise EngineError(
                    f"{engine.name} sampled with weight version {max(piece.weight_versions)}, but the engines hold version "
                    f"{self._weight_version}; only this run may update its engines."
                )
            partials[index].extend(piece)
            if piece.finish_reason == "abort":
                reasons.append(piece.reason)

        flight.engine = engine
        engine.outstanding_tokens += expected
        streaming = asyncio.ensure_future(engine.client.stream(continuations, request.params, take))
        loss = asyncio.ensure_future(engine.loss.wait())
        try:
            await asyncio.wait({streaming, loss}, return_when=asyncio.FIRST_COMPLETED)
            if streaming.done():
                streaming.result()
        except EngineLostError as error:
            self._lose(engine, error)
        finally:
            await _end([streaming, loss])
            engine.outstanding_tokens -= expected
            flight.engine = None
        if reasons and not flight.aborted:
            logger.warning(f"{engine.name} ended samples of request {request.request_id}: {reasons[0]}")
            return 1
        return 0

    async def _pick(self, flight: _Flight) -> _Routed | None:
        """The serving engine with the least to do, awaited if there is none; None when the request is aborted meanwhile."""
        while not flight.aborted:
            if self._fatal is not None:
                raise self._fatal
            serving = [engine for engine in self._engines if engine.state is _State.SERVING]
            if serving:
                return min(serving, key=lambda engine: engine.outstanding_tokens)
            await self._wait_for_change()
        return None

    async def _reachable(self) -> list[_Routed]:
        """Engines that are not lost, awaited if there is none."""
        while not (engines := [engine for engine in self._engines if engine.state is not _State.LOST]):
            await self._wait_for_change()
        return engines

    async def _wait_for_change(self) -> None:
        """Until an engine changes its state. EngineError past the deadline without any that serves."""
        if self._fatal is not None:
            raise self._fatal
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
                f"the last loss: {self._last_loss}"
            ) from self._last_loss

    def _expected_tokens(self, request: GenerateRequest, partials: Sequence[PartialSample]) -> float:
        """Prompt and responses; a response is taken to be as long as recent ones."""
        limit = request.params.max_response_tokens
        mean = min(self._mean_response_tokens or limit, limit)
        rest = sum(max(mean - len(partial.token_ids), 0.05 * mean) for partial in partials)
        return len(request.prompt_token_ids) + rest

    def _remember(self, partials: Sequence[PartialSample]) -> None:
        lengths = [len(partial.token_ids) for partial in partials if partial.is_finished]
        if lengths:
            mean = sum(lengths) / len(lengths)
            before = self._mean_response_tokens
            self._mean_response_tokens = mean if before is None else 0.95 * before + 0.05 * mean

    async def _abort_on(self, engine: _Routed, flights: Sequence[_Flight]) -> None:
        """Tell the server; that it is lost is noticed elsewhere."""
        rids = [rid for flight in flights if flight.engine is engine for rid in flight.rids]
        try:
            await asyncio.gather(*(engine.client.abort(rid, CALL_SECONDS) for rid in rids))
        except EngineLostError as error:
            self._lose(engine, error)

    def _watch_all(self) -> None:
        """Begin to watch the engines that serve, unless they are watched already."""
        if not self._watchers:
            serving = [engine for engine in self._engines if engine.state is _State.SERVING]
            self._watchers = {asyncio.ensure_future(self._watch(engine)) for engine in serving}

    async def _watch(self, engine: _Routed) -> None:
        """Look at the health of an engine until it is lost; it may be slow to answer, but not silent past the deadline."""
        interval, deadline = self._config.health_interval_seconds, self._config.health_deadline_seconds
        engine.last_sign = time.monotonic()
        while engine.state is _State.SERVING:
            await asyncio.sleep(interval)
            try:
                if await engine.client.is_healthy(max(interval, deadline / 2)):
                    engine.last_sign = time.monotonic()
            except EngineLostError as error:
                self._lose(engine, error)
                return
            if time.monotonic() - engine.last_sign > deadline:
                words = f"{engine.name} gave no sign of health for rollout.engine.health_deadline_seconds ({deadline:g})"
                self._lose(engine, EngineLostError(words, engine.name))

    def _lose(self, engine: _Routed, error: EngineLostError) -> None:
        """Take it out and begin to bring it back; the second to notice has nothing to do."""
        if engine.state is _State.LOST:
            return
        engine.state, self._last_loss = _State.LOST, error
        self.num_engines_lost += 1
        engine.loss.set()
        others = sum(other.state is _State.SERVING for other in self._engines)
        logger.warning(f"{error}; it is started again, {others} other engines serve")
        self._in_background(self._bring_back(engine))

    async def _bring_back(self, engine: _Routed) -> None:
        """Start it again, give it the current weights, let it serve."""
        await engine.client.close()
        while True:
            try:
                endpoint = await self._restart(engine.name)
            except EngineError as error:
                logger.warning(f"{engine.name} does not come back: {error}")
                self._last_loss = error
                await asyncio.sleep(RETRY_SECONDS)
                continue
            engine.client, engine.loss, engine.state = self._client(endpoint), asyncio.Event(), _State.FRESH
            engine.is_released = False
            self._notify()
            async with self._updating:
                if engine.state is not _State.FRESH:  # an update has been here before
                    return
                try:
                    if self.resync is not None:
                        await self.resync(endpoint, self._weight_version)
                    await self._take_on(engine, self._weight_version)
                except EngineLostError as error:
                    engine.state, self._last_loss = _State.LOST, error
                    await engine.client.close()
                    continue
                except EngineError as error:
                    logger.warning(f"{engine.name} serves after the next weight update: {error}")
                    return
                self._serve(engine)
                logger.warning(f"{engine.name} serves again, with weight version {self._weight_version}")
                return

    async def _take_on(self, engine: _Routed, version: int) -> None:
        """After an update: EngineError when the engine names another version. Prefixes computed with older weights are dropped."""
        held = await engine.client.weight_version(CALL_SECONDS)
        if held != version:
            raise EngineError(f"{engine.name} holds weight version {held} after an update to version {version}; look at its log.")
        await engine.client.flush_cache(CALL_SECONDS)

    def _serve(self, engine: _Routed) -> None:
        if engine.state is _State.LOST:
            return
        was_serving, engine.state, self._none_since = engine.state is _State.SERVING, _State.SERVING, None
        if self._flights and not was_serving:
            self._watchers.add(asyncio.ensure_future(self._watch(engine)))
        self._notify()

    def _in_background(self, work: Awaitable[None]) -> None:
        """Errors that are no loss of an engine (a wrong fingerprint) end the run at the next request."""

        async def run() -> None:
            try:
                await work
            except DapoMegatronError as error:
                self._fatal = error
                self._notify()

        task = asyncio.get_running_loop().create_task(run())
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def _notify(self) -> None:
        """Wake all that wait for a change."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


async def _end(tasks: Collection[asyncio.Future[Any]]) -> None:
    """Cancel what is not done and wait for it; errors are those of tasks that nobody waits for any more."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
