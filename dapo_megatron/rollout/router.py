"""Many SGLang servers as one engine: which of them gets a request, and what becomes of it when that one is lost.

    request (a prompt and its G samples) ──> the engine with the fewest outstanding tokens
        the engine is lost: the request goes to another one, each sample after the tokens that have arrived

A group stays together, so that its prompt is computed once. `fleet.py` brings lost engines back. Sampling under SGLang is not
reproducible bit by bit: `GenerateRequest.seed` has no effect.

    in work ──(hold)──> held: the engines are paused, the streams stay open, nobody waits for the samples
       ^                  │ weights are updated, also more than once
       └──(the request comes again, with the samples that were given out)──┘

The pause ends with the next request, whosever it is: held ones go on beside an evaluation. A request of which no token has come is not held
but aborted, so that every held one has a token that names the weights from before: its group never counts as on-policy.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from dapo_megatron.config.schema import SglangEngineConfig
from dapo_megatron.rollout.engine import GenerateRequest, GenerateResult
from dapo_megatron.rollout.fleet import (
    CALL_SECONDS,
    FAREWELL_SECONDS,
    EngineLife,
    Fleet,
    Restart,
    UpdateReport,
    WeightKeeper,
    end,
)
from dapo_megatron.rollout.partial_sample import PartialSample
from dapo_megatron.rollout.routed_experts import ExpertShape
from dapo_megatron.rollout.sglang_engine import Piece
from dapo_megatron.types import EngineEndpoint, EngineError, EngineLostError, Sample

ABORT_POLL_SECONDS = 0.5
"""An abort that overtakes its request has no effect on the server, so it is repeated."""
ABORT_DEADLINE_SECONDS = 30.0
"""A server that has not ended an aborted request by then is not waited for."""
MAX_ABORTS_BY_ENGINE = 3
"""How often an engine may end a request that nobody aborted."""
MAX_LOSSES = 5
"""Engines that may be lost one after the other while they work on a request and have sent no token of it."""

logger = logging.getLogger(__name__)

Decode = Callable[[list[list[int]]], list[str]]
"""Token ids to texts, special tokens left out."""


@dataclass(eq=False, slots=True)
class _Flight:
    """A request in work, or held. `rids` and `versions` are those of the current attempt."""

    request: GenerateRequest
    partials: tuple[PartialSample, ...]
    work: asyncio.Task[GenerateResult] = field(init=False)
    """Brings the samples to their end."""
    put_down: asyncio.Future[None] = field(init=False)
    """Done when the request is held, and not waited for any more."""
    given: tuple[Sample, ...] = ()
    """What was given out when it was held."""
    life: EngineLife | None = None
    stream: asyncio.Task[None] | None = None
    rids: tuple[str, ...] = ()
    """By sample."""
    versions: list[int] = field(default_factory=list)
    """Of the weights that its engine has had."""
    aborted: bool = False
    num_losses: int = 0
    """Since the last token that came."""
    num_aborts: int = 0
    """By engines, of their own accord."""

    @property
    def is_finished(self) -> bool:
        """Whether no engine is needed any more."""
        return all(partial.is_finished for partial in self.partials)

    @property
    def num_tokens(self) -> int:
        return sum(len(partial.token_ids) for partial in self.partials)

    def take_redrawn(self) -> int:
        """Tokens that were thrown away since this was asked last."""
        return sum(partial.take_redrawn() for partial in self.partials)


class Router:
    """Implements `Generator` over SGLang servers. To be used in one event loop and closed there."""

    def __init__(
        self,
        endpoints: Sequence[EngineEndpoint],
        config: SglangEngineConfig,
        decode: Decode,
        *,
        restart: Restart,
        keeper: WeightKeeper | None = None,
        mixes_versions: bool = False,
        may_pause: bool = False,
        experts: ExpertShape | None = None,
    ):
        """`keeper` None: the engines keep the weights they were started with.

        `mixes_versions`: where an engine comes back with newer weights, samples go on under them; else they begin again, but for
        those of a request that had been started before. `may_pause`: engines keep their memory between rollouts, so that requests
        can be held; else `hold` aborts. `experts`: samples have routed experts, of this shape.
        """
        self._fleet = Fleet(endpoints, config, restart, keeper)
        self._decode, self._mixes_versions, self._may_pause, self._experts = decode, mixes_versions, may_pause, experts
        self._flights: dict[int, _Flight] = {}
        self._held: dict[int, _Flight] = {}
        self._names = itertools.count()
        self._prefix = secrets.token_hex(4)
        self._mean_response_tokens: float | None = None
        self._half_sent: int | None = None

    @property
    def weight_version(self) -> int:
        """Of the weights that tokens are drawn from."""
        return self._fleet.weight_version

    @weight_version.setter
    def weight_version(self, version: int) -> None:
        self._fleet.weight_version = version

    @property
    def num_engines_lost(self) -> int:
        """Over the life of the router."""
        return self._fleet.num_lost

    @property
    def endpoints(self) -> tuple[EngineEndpoint, ...]:
        """Of the engines that a weight update goes to."""
        return tuple(life.client.endpoint for life in self._fleet.started)

    @property
    def serving(self) -> tuple[EngineEndpoint, ...]:
        """Of the engines that take requests now."""
        return tuple(life.client.endpoint for life in self._fleet.serving)

    async def generate(self, requests: Sequence[GenerateRequest]) -> AsyncGenerator[GenerateResult, None]:
        """See `Generator.generate`. EngineError when no engine could be brought back within the deadline."""
        if self._half_sent is not None:
            raise EngineError(
                f"weight version {self._half_sent} has not reached the engines, which may hold a mixture; update_weights() must "
                "end well before generate()."
            )
        await self._fleet.resume()
        flights = self._take_up(requests)
        self._fleet.watch()
        pending = {asyncio.create_task(self._answer(flight)) for flight in flights}
        try:
            while pending:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    yield task.result()
        finally:
            await end(pending)
            left = [flight for flight in flights if self._flights.get(flight.request.request_id) is flight]
            await end([flight.work for flight in left])
            for flight in left:
                self._land(flight)

    async def abort(self, request_ids: Collection[int]) -> None:
        """See `Generator.abort`; returns when the requests have ended."""
        flights = self._in_work(request_ids)
        for flight in flights:
            flight.aborted = True
        self._fleet.notify()
        works = [flight.work for flight in flights]
        tellers = [asyncio.create_task(self._tell_server(flight)) for flight in flights]
        try:
            if works and (await asyncio.wait(works, timeout=ABORT_DEADLINE_SECONDS))[1]:
                for flight in flights:
                    self._give_up(flight)
                await asyncio.wait(works)
        finally:
            await end(tellers)

    async def hold(self, request_ids: Collection[int]) -> None:
        """See `Generator.hold`. Pauses the engines, so no other request may be in work: EngineError when one is."""
        flights = self._in_work(request_ids)
        begun = [flight for flight in flights if self._may_pause and flight.num_tokens]
        await self.abort([flight.request.request_id for flight in flights if flight not in begun])
        if not begun:
            return
        if others := [number for number, flight in self._flights.items() if number not in request_ids and not flight.is_finished]:
            raise EngineError(f"requests {others} are in work and would be paused with those that are held; abort them first.")
        await self._fleet.pause()
        for flight in self._in_work(request_ids):
            if flight in begun:
                flight.put_down.set_result(None)
                self._held[flight.request.request_id] = self._flights.pop(flight.request.request_id)

    async def let_go(self, request_ids: Collection[int]) -> int:
        """See `Generator.let_go`; the samples end on their servers."""
        flights = [self._held.pop(request_id) for request_id in request_ids if request_id in self._held]
        await asyncio.gather(*map(self._drop, flights))
        num_given = sum(len(sample.token_ids) for flight in flights for sample in flight.given)
        return sum(flight.num_tokens + flight.take_redrawn() for flight in flights) - num_given

    async def release_memory(self) -> None:
        """Leave the GPUs to the actor until the next `update_weights`; see `Fleet.release_memory`. EngineError while a request is in work."""
        self._require_idle("memory is released")
        await self._fleet.release_memory()

    async def update_weights[Report: UpdateReport](
        self, version: int, push: Callable[[Sequence[EngineEndpoint]], Awaitable[Report]]
    ) -> Report:
        """See `Fleet.update_weights`. EngineError while a request is in work: it would draw from a mixture of two versions.

        Held ones take the update under the pause, and are paused for it where they have gone on.
        """
        self._require_idle("weights are updated")
        if self._held:
            await self._fleet.pause()
        self._half_sent = version
        report = await self._fleet.update_weights(version, push)
        self._half_sent = None
        for flight in self._held.values():
            flight.versions.append(self.weight_version)
        return report

    async def close(self) -> None:
        """End what is held and what runs in the background, and close the connections; no server is left paused."""
        held, self._held = self._held, {}
        await asyncio.gather(*map(self._drop, held.values()))
        await self._fleet.close()

    def _require_idle(self, what_is_done: str) -> None:
        if self._flights:
            raise EngineError(f"{len(self._flights)} requests are in work; {what_is_done} between rollouts only.")

    def _in_work(self, request_ids: Collection[int]) -> list[_Flight]:
        return [flight for request_id in request_ids if (flight := self._flights.get(request_id))]

    def _take_up(self, requests: Sequence[GenerateRequest]) -> list[_Flight]:
        """Put requests in work: new ones, and those that were held."""
        ids = [request.request_id for request in requests]
        if twice := [number for number in ids if number in self._flights or ids.count(number) > 1]:
            raise EngineError(f"request ids must differ among running requests, but do not: {twice}; number them anew.")
        held = [self._held.get(request.request_id) if request.started else None for request in requests]
        for request, flight in zip(requests, held, strict=True):
            if flight is not None and flight.given != request.started:
                raise EngineError(f"request {request.request_id} is held with other samples than it comes with; let it go first.")
        flights = [flight or self._begin(request) for request, flight in zip(requests, held, strict=True)]
        for flight, was_held in zip(flights, held, strict=True):
            if was_held is not None:
                del self._held[flight.request.request_id]
            flight.put_down = asyncio.get_running_loop().create_future()
            self._flights[flight.request.request_id] = flight
        return flights

    def _begin(self, request: GenerateRequest) -> _Flight:
        started = request.started or (None,) * request.num_samples
        partials = tuple(PartialSample(request.prompt_token_ids, sample, self._experts) for sample in started)
        flight = _Flight(request, partials)
        flight.work = asyncio.create_task(self._complete(flight))
        return flight

    async def _answer(self, flight: _Flight) -> GenerateResult:
        """The samples at their end or, when the request is held before, what there is of them."""
        either: list[asyncio.Future[Any]] = [flight.work, flight.put_down]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if flight.is_finished:  # in the moment of the hold
            await asyncio.wait({flight.work})
        if not flight.put_down.done():
            self._land(flight)
        elif not flight.work.done():
            return await self._give_out(flight)
        else:
            self._held.pop(flight.request.request_id, None)
        return flight.work.result()

    async def _give_out(self, flight: _Flight) -> GenerateResult:
        """The samples as they are now, to which they are added when the request comes again."""
        samples, num_redrawn = [partial.sample("") for partial in flight.partials], flight.take_redrawn()
        texts = await asyncio.to_thread(self._decode, [sample.token_ids.tolist() for sample in samples])
        flight.given = tuple(replace(sample, text=text) for sample, text in zip(samples, texts, strict=True))
        return GenerateResult(flight.request.request_id, flight.given, num_redrawn)

    async def _complete(self, flight: _Flight) -> GenerateResult:
        """One request to its end, over as many engines as it takes."""
        request, partials = flight.request, flight.partials
        while not flight.aborted and (unfinished := [partial for partial in partials if not partial.is_finished]):
            life = await self._pick(flight)
            if life is None:
                break
            await self._attempt(flight, life, unfinished)
            for partial in partials:
                partial.finish_if_complete(request.params)
        texts = await asyncio.to_thread(self._decode, [partial.token_ids for partial in partials])
        self._remember(partials)
        samples = tuple(partial.sample(text) for partial, text in zip(partials, texts, strict=True))
        return GenerateResult(request.request_id, samples, flight.take_redrawn())

    def _land(self, flight: _Flight) -> None:
        """The request is no longer in work; engines are watched only while one is."""
        del self._flights[flight.request.request_id]
        if not self._flights:
            self._fleet.unwatch()

    async def _drop(self, flight: _Flight) -> None:
        """Give a held request up, here and on its server."""
        if flight.life is not None:
            with suppress(EngineLostError):  # which others will notice
                await asyncio.gather(*(flight.life.client.abort(rid, FAREWELL_SECONDS) for rid in flight.rids))
        await end([flight.work])

    async def _pick(self, flight: _Flight) -> EngineLife | None:
        """The serving engine with the least to do, awaited if there is none; None when the request is aborted meanwhile."""
        while not flight.aborted:
            self._fleet.check()
            if self._fleet.is_paused:
                await self._fleet.wait_for_resume()
            elif serving := self._fleet.serving:
                return min(serving, key=lambda life: life.outstanding_tokens)
            else:
                await self._fleet.wait_for_change()
        return None

    async def _attempt(self, flight: _Flight, life: EngineLife, partials: Sequence[PartialSample]) -> None:
        """Let one engine go on with the samples. A lost engine is noted, not raised."""
        request, version = flight.request, self.weight_version
        if not self._mixes_versions and not request.started:
            num_dropped = sum(partial.drop_other_versions(version) for partial in partials)
            if num_dropped:
                logger.warning(
                    f"request {request.request_id} begins again with weight version {version}: {num_dropped} tokens are dropped"
                )
        flight.versions = [version]
        number = next(self._names)
        # The server takes an id for the prefix of others: no id may begin another one.
        flight.rids = tuple(f"{self._prefix}-{number}-{index}-" for index in range(len(partials)))
        continuations = [partial.continuation(rid, request.params) for rid, partial in zip(flight.rids, partials, strict=True)]
        # One number for all samples of a call.
        routed_from = min(partial.num_routed for partial in partials) if self._experts is not None else None
        expected = self._expected_tokens(request, partials)
        reasons: list[str] = []

        def take(index: int, piece: Piece) -> None:
            life.last_sign, flight.num_losses = time.monotonic(), 0
            named = piece.versions_of_all or piece.weight_versions
            before = partials[index].weight_versions[: len(partials[index].token_ids) + len(piece.token_ids) - len(named)]
            of_sample = [*before[-1:], *named]
            if not set(named) <= set(flight.versions) or of_sample != sorted(of_sample):
                found, held = ", then ".join(map(str, dict.fromkeys(of_sample))), ", then ".join(map(str, flight.versions))
                raise EngineError(
                    f"{life.name} sampled with weight version {found}, but the engines hold version {held}; only this run may update "
                    "its engines."
                )
            partials[index].extend(piece, routed_from or 0)
            num_tokens, limit = len(partials[index].token_ids), request.params.max_response_tokens
            if piece.finish_reason == "length" and num_tokens < limit:
                raise EngineError(
                    f"{life.name} cut a response to request {request.request_id} off after {num_tokens} tokens, before its "
                    f"max_response_tokens ({limit}): prompt ({len(request.prompt_token_ids)}) and response do not fit its context or "
                    "its KV cache; raise rollout.engine.mem_fraction_static or max_total_tokens, or lower max_response_tokens."
                )
            if piece.finish_reason == "abort":
                reasons.append(piece.reason)

        key = f"weights {version}"  # no prefix of older weights, which a cache in use still holds after an update
        stream = asyncio.create_task(life.client.stream(continuations, request.params, take, routed_from, key))
        flight.life, flight.stream = life, stream
        life.streams.add(stream)
        life.outstanding_tokens += expected
        try:
            await asyncio.wait({stream})
            if not stream.cancelled():  # by the loss of the engine, or because an abort was in vain
                stream.result()
        except EngineLostError as error:
            self._fleet.lose(life, error)
        finally:
            flight.life = flight.stream = None
            life.streams.discard(stream)
            life.outstanding_tokens -= expected
            await end([stream])
        self._count_failures(flight, life, reasons)

    def _count_failures(self, flight: _Flight, life: EngineLife, reasons: Sequence[str]) -> None:
        """EngineError for a request that cannot be got through: engines end it, or end by it."""
        request_id = flight.request.request_id
        if reasons and not flight.aborted:
            flight.num_aborts += 1
            logger.warning(f"{life.name} ended samples of request {request_id}: {reasons[0]}")
            if flight.num_aborts > MAX_ABORTS_BY_ENGINE:
                raise EngineError(
                    f"{life.name} ended request {request_id} {flight.num_aborts} times, last with {reasons[0]!r}; look at its log."
                )
        if life.is_lost:
            flight.num_losses += 1
            if flight.num_losses >= MAX_LOSSES:
                raise EngineError(
                    f"{flight.num_losses} engines were lost one after the other with request {request_id} "
                    f"({len(flight.request.prompt_token_ids)} prompt tokens) before a token of it came; look at the log of {life.name}."
                )

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

    async def _tell_server(self, flight: _Flight) -> None:
        """That the request is aborted, again and again; that the server is lost is noticed here too."""
        while True:
            if (life := flight.life) is not None:
                try:
                    await asyncio.gather(*(life.client.abort(rid, CALL_SECONDS) for rid in flight.rids))
                except EngineLostError as error:
                    self._fleet.lose(life, error)
            await asyncio.sleep(ABORT_POLL_SECONDS)

    def _give_up(self, flight: _Flight) -> None:
        """Take what has come for all there is."""
        if flight.stream is not None:
            logger.warning(f"request {flight.request.request_id} is aborted, but its engine has not ended it; it is left there")
            flight.stream.cancel()
