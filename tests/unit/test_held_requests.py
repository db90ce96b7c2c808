"""Requests that are held while the weights change: their streams stay open, and nothing of them is sent or computed twice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from dapo_megatron.config.schema import SglangEngineConfig
from dapo_megatron.rollout.attached import Reattach, attach
from dapo_megatron.rollout.engine import GenerateRequest, GenerateResult
from dapo_megatron.rollout.router import Router
from dapo_megatron.rollout.sglang_server import IN_PLACE_WATCHDOG_SECONDS
from dapo_megatron.types import EngineError, Sample
from tests.unit.fake_server import FakeServer
from tests.unit.test_router import EXPERTS, PROMPT, Run, complete, fleet, request, tokens, update

LIMIT = 20


def pausing(num_servers: int = 1, **settings):
    return fleet(num_servers, mixes_versions=True, may_pause=True, **settings)


def long(request_id: int, **changes) -> GenerateRequest:
    return request(request_id, max_response_tokens=LIMIT, **changes)


async def tokens_come(router: Router, num: int) -> None:
    """Until every held request or, where none is, every one in work has so many of each sample."""
    flights = list((router._held or router._flights).values())
    while any(len(partial.token_ids) < num for flight in flights for partial in flight.partials):
        await asyncio.sleep(0.001)


def stop_after(state: Run, num: int | None) -> None:
    """Tokens that each sample gets on its server; None: all."""
    for server in state.servers.values():
        server.pauses_after = num
        if num is None:
            server.may_generate.set()


async def begin(router: Router, state: Run, *requests: GenerateRequest) -> list[asyncio.Future]:
    """Requests that have three tokens of each sample, and get no more until `stop_after`."""
    stop_after(state, 3)
    work = [asyncio.ensure_future(complete(router, item)) for item in requests]
    while len(router._flights) < len(requests):
        await asyncio.sleep(0.001)
    await tokens_come(router, 3)
    return work


async def hold(router: Router, state: Run, *requests: GenerateRequest) -> dict[int, GenerateResult]:
    """Begin with the requests, and hold them."""
    work = await begin(router, state, *requests)
    holding = asyncio.ensure_future(router.hold({item.request_id for item in requests}))
    num_samples = sum(item.num_samples for item in requests)
    while not holding.done() and sum(len(server.aborted) for server in state.servers.values()) < num_samples:
        await asyncio.sleep(0.001)
    stop_after(state, None)
    await holding
    return {key: value for results in await asyncio.gather(*work) for key, value in results.items()}


async def go_on(router: Router, state: Run, num: int) -> None:
    """Until held samples have so many tokens, beside an evaluation."""
    stop_after(state, num)
    evaluation = asyncio.ensure_future(complete(router, request(7)))
    await tokens_come(router, num)
    evaluation.cancel()
    await asyncio.wait([evaluation])


def again(item: GenerateRequest, results: dict[int, GenerateResult]) -> GenerateRequest:
    return replace(item, started=results[item.request_id].samples)


def assert_versions(samples: tuple[Sample, ...], *versions: int) -> None:
    """Whole samples, of these versions in a row, each with a token."""
    for sample in samples:
        assert sample.token_ids.tolist() == tokens(LIMIT)
        assert list(dict.fromkeys(sample.weight_versions.tolist())) == list(versions)
        assert sorted(sample.weight_versions) == sample.weight_versions.tolist()
        assert sample.finish_reason == "length"


@pytest.mark.parametrize("mode", ["retract", "in_place"])
async def test_held_request_goes_on_in_its_stream_with_the_new_weights(mode: str):
    async with pausing(2, pause_mode=mode) as (router, state):
        requests = [long(0), long(1)]
        first = await hold(router, state, *requests)
        assert all(server.pauses == [mode] == [server.paused] for server in state.servers.values())
        assert not any(result.is_complete for result in first.values())
        flushes = [server.num_flushes for server in state.servers.values()]
        await update(router, state, 1)
        assert all(server.paused == mode for server in state.servers.values()), "nothing is drawn until somebody asks"
        flushed = [server.num_flushes > before for server, before in zip(state.servers.values(), flushes, strict=True)]
        assert flushed == [mode == "retract"] * 2
        second = await complete(router, *(again(item, first) for item in requests))
        for server in state.servers.values():
            assert server.prompts == [list(PROMPT)] * 2, "each sample was sent once"
            assert server.paused is None
        for request_id, result in second.items():
            assert_versions(result.samples, 0, 1)
            for sample, before in zip(result.samples, first[request_id].samples, strict=True):
                assert sample.log_probs[: len(before.log_probs)].tolist() == before.log_probs.tolist()
        assert not router._held and router.num_engines_lost == 0


async def test_tokens_that_come_after_the_hold_are_of_the_weights_that_drew_them():
    async with pausing() as (router, state):
        (server,) = state.servers.values()
        server.tokens_per_piece, server.pauses_after = 7, 4
        item = long(0, num_samples=1)
        work = asyncio.ensure_future(complete(router, item))
        while server.may_generate.is_set():
            await asyncio.sleep(0.001)
        await tokens_come(router, 1)
        await router.hold({0})
        first = await work
        assert len(first[0].samples[0].token_ids) == 1, "the server keeps the other three"
        stop_after(state, None)
        await update(router, state, 1)
        result = (await complete(router, again(item, first)))[0]
        assert_versions(result.samples, 0, 1)
        assert result.samples[0].weight_versions.tolist().count(0) == 4


async def test_request_of_which_no_token_has_come_is_sent_again():
    async with pausing(2) as (router, state):
        first_server, second_server = state.servers.values()
        first_server.pauses_after, second_server.pauses_after = 3, 0
        requests = [long(0), long(1)]
        work = [asyncio.ensure_future(complete(router, item)) for item in requests]
        while len(second_server.prompts) < 2 or not first_server.generated.is_set():
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.001)
        while not router._flights[0].num_tokens:
            await asyncio.sleep(0.001)
        holding = asyncio.ensure_future(router.hold({0, 1}))
        while len(second_server.aborted) < 2:
            await asyncio.sleep(0.001)
        second_server.may_generate.set()
        await holding
        first = {key: value for results in await asyncio.gather(*work) for key, value in results.items()}
        assert list(router._held) == [0] and not first_server.aborted
        stop_after(state, None)
        await update(router, state, 1)
        second = await complete(router, *(again(item, first) for item in requests))
        assert len(first_server.prompts) + len(second_server.prompts) == 2 + 2 + 2
        assert all(sample.token_ids.tolist() == tokens(LIMIT) for result in second.values() for sample in result.samples)


async def test_engines_that_share_memory_with_the_actor_abort_what_is_to_be_held():
    async with fleet(1, mixes_versions=True) as (router, state):
        item = long(0)
        first = await hold(router, state, item)
        (server,) = state.servers.values()
        assert not server.pauses and not router._held and server.aborted
        await update(router, state, 1)
        assert_versions((await complete(router, again(item, first)))[0].samples, 0, 1)
        assert [len(prompt) for prompt in server.prompts] == [3, 3, *(3 + len(sample.token_ids) for sample in first[0].samples)]


async def test_evaluation_between_steps_ends_the_pause_and_the_held_go_on_beside_it():
    async with pausing() as (router, state):
        item = long(0)
        first = await hold(router, state, item)
        await update(router, state, 1)
        measured = await complete(router, request(0, max_response_tokens=4))  # an evaluation numbers its own
        assert [len(sample.token_ids) for sample in measured[0].samples] == [4, 4]
        assert set(measured[0].samples[0].weight_versions.tolist()) == {1}
        (server,) = state.servers.values()
        assert server.paused is None and list(router._held) == [0]
        assert_versions((await complete(router, again(item, first)))[0].samples, 0, 1)
        assert server.prefix_keys == ["weights 0", "weights 1"], "no prefix of older weights is used"


async def test_requests_that_went_on_are_paused_again_for_the_next_update():
    async with pausing() as (router, state):
        item = long(0)
        first = await hold(router, state, item)
        await update(router, state, 1)
        await go_on(router, state, 6)
        await update(router, state, 2)
        stop_after(state, None)
        (server,) = state.servers.values()
        assert len(server.pauses) == 2 and server.paused
        assert_versions((await complete(router, again(item, first)))[0].samples, 0, 1, 2)


async def test_pause_ends_without_an_update_too():
    async with pausing() as (router, state):
        item = long(0)
        first = await hold(router, state, item)
        assert_versions((await complete(router, again(item, first)))[0].samples, 0)


@pytest.mark.parametrize("when", ["training", "update", "resume"])
async def test_engine_that_is_lost_under_the_pause_loses_no_token_that_had_come(when: str):
    async with pausing(2, restart_deadline_seconds=60) as (router, state):
        state.may_start.clear()
        requests = [long(0), long(1)]
        first = await hold(router, state, *requests)
        dying = state.servers["engine 0"]
        if when == "training":
            await dying.die()
            while len(router.serving) > 1:
                await asyncio.sleep(0.001)
        await update(router, state, 1, ["engine 0"] if when == "update" else [])
        if when == "resume":
            await dying.die()
        second = await complete(router, *(again(item, first) for item in requests))
        assert router.num_engines_lost == 1
        for result in second.values():
            assert_versions(result.samples, 0, 1)
        assert len(state.servers["engine 1"].prompts) == 4


async def test_held_samples_wait_for_the_end_of_the_pause_when_their_engine_is_lost():
    async with pausing(2) as (router, state):
        requests = [long(0), long(1)]
        await hold(router, state, *requests)
        await state.servers["engine 0"].die()
        await asyncio.sleep(0.05)
        assert len(state.servers["engine 1"].prompts) == 2, "a paused engine is asked for nothing"


@pytest.mark.parametrize("version", [0, 5])
async def test_weights_that_this_run_did_not_send_are_found_in_held_samples(version: int):
    async with pausing() as (router, state):
        await update(router, state, 1)
        item = long(0)
        first = await hold(router, state, item)
        await update(router, state, 2)
        state.servers["engine 0"].weight_version = version
        with pytest.raises(EngineError, match=f"weight version 1, then {version}|version {version}.*hold version 1, then 2"):
            await complete(router, again(item, first))


async def test_held_request_that_is_let_go_ends_on_its_server_and_tells_what_came_since():
    async with pausing() as (router, state):
        item = long(0, num_samples=1)
        first = await hold(router, state, item)
        assert first[0].samples[0].token_ids.tolist() == tokens(3)
        await update(router, state, 1)
        await go_on(router, state, 6)
        assert await router.let_go({0, 9}) == 3
        stop_after(state, None)
        (server,) = state.servers.values()
        assert server.aborted and not router._held
        result = (await complete(router, long(0)))[0]
        assert set(result.samples[0].weight_versions.tolist()) == {1}, "the prompt is asked again"


async def test_request_that_comes_with_other_samples_than_it_is_held_with_is_refused():
    async with pausing() as (router, state):
        item = long(0, num_samples=1)
        await hold(router, state, item)
        other = Sample(tokens(1), [-0.5], [0], "abort", "")
        with pytest.raises(EngineError, match="request 0 is held with other samples"):
            await complete(router, replace(item, started=(other,)))


async def test_nothing_else_may_be_in_work_when_requests_are_held():
    async with pausing() as (router, state):
        work = await begin(router, state, long(0), long(1))
        with pytest.raises(EngineError, match=r"requests \[1\] are in work and would be paused"):
            await router.hold({0})
        stop_after(state, None)
        await asyncio.gather(*work)


async def test_closing_leaves_no_server_paused_and_no_sample_on_it():
    async with pausing(2) as (router, state):
        await hold(router, state, long(0), long(1))
        await router.close()
        for server in state.servers.values():
            assert server.paused is None and server.aborted
            while server.num_running:
                await asyncio.sleep(0.001)


async def test_closing_after_an_update_that_failed_leaves_no_server_paused():
    async def push(endpoints: object) -> None:
        raise EngineError("the actor is gone")

    async with pausing() as (router, state):
        await hold(router, state, long(0))
        with pytest.raises(EngineError, match="the actor is gone"):
            await router.update_weights(1, push)
        await router.close()
        assert state.servers["engine 0"].paused is None


async def test_requests_that_are_given_up_before_they_are_taken_up_leave_the_held_ones_alone():
    """As in a rollout that is dropped: its own requests end, the state before it is what counts."""
    async with pausing() as (router, state):
        first = await hold(router, state, long(0, num_samples=1))
        work = asyncio.ensure_future(complete(router, long(1)))
        while not router._flights:
            await asyncio.sleep(0.001)
        work.cancel()
        await asyncio.wait([work])
        assert not router._flights and list(router._held) == [0]
        assert router._held[0].given == first[0].samples


async def test_held_request_whose_sample_is_complete_keeps_it_and_its_experts():
    async with pausing(experts=EXPERTS) as (router, state):
        item = long(0)
        first = await hold(router, state, item)
        assert all(sample.routed_experts is None for sample in first[0].samples)
        await update(router, state, 1)
        for sample in (await complete(router, again(item, first)))[0].samples:
            assert sample.routed_experts is not None and len(sample.routed_experts) == len(PROMPT) + LIMIT - 1


@asynccontextmanager
async def attachable(**info: object) -> AsyncIterator[tuple[FakeServer, SglangEngineConfig]]:
    server = FakeServer("engine 0")
    server.info = {"skip_tokenizer_init": True, "incremental_streaming_output": True, "tp_size": 1, **info}
    endpoint = await server.start()
    try:
        yield server, SglangEngineConfig(engine_urls=(endpoint.url,))
    finally:
        await server.die()


async def test_server_that_a_killed_run_left_paused_goes_on_when_it_is_attached():
    async with attachable() as (server, config):
        server.paused = "retract"
        endpoints = await attach(config)
        assert server.paused is None
        server.paused = "retract"
        again = await Reattach(config, endpoints)("engine 0")
        assert server.paused is None and again.life == 1


@pytest.mark.parametrize("seconds", [None, 300, IN_PLACE_WATCHDOG_SECONDS])
async def test_attached_server_whose_watchdog_would_end_a_long_pause_in_place_is_refused(seconds: int | None):
    async with attachable(watchdog_timeout=seconds) as (_, config):
        in_place = config.model_copy(update={"pause_mode": "in_place"})
        if seconds == IN_PLACE_WATCHDOG_SECONDS:
            assert len(await attach(in_place)) == 1
        else:
            with pytest.raises(EngineError, match=f"watchdog_timeout {seconds}.*--watchdog-timeout {IN_PLACE_WATCHDOG_SECONDS}"):
                await attach(in_place)
        assert len(await attach(config)) == 1
