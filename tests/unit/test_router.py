"""Routing over servers, and what happens when one is lost; the servers are fakes that count positions."""

import asyncio
import base64
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from dapo_megatron.config.schema import SglangEngineConfig
from dapo_megatron.rollout.engine import GenerateRequest, GenerateResult, SamplingParams
from dapo_megatron.rollout.partial_sample import PartialSample
from dapo_megatron.rollout.room import require_room
from dapo_megatron.rollout.routed_experts import ExpertShape
from dapo_megatron.rollout.router import Router
from dapo_megatron.types import EngineEndpoint, EngineError, EngineLostError, FingerprintError, Sample, VersionGoneError
from tests.unit.fake_server import FakeServer, routed_experts

PROMPT = (7, 7, 7)


def request(request_id: int, num_samples: int = 2, max_response_tokens: int = 8, **changes) -> GenerateRequest:
    params = SamplingParams(max_response_tokens=max_response_tokens)
    return GenerateRequest(request_id, PROMPT, num_samples, seed=0, params=params, **changes)


def tokens(num: int, start: int = len(PROMPT)) -> list[int]:
    """What the fake generates after the prompt."""
    return list(range(start, start + num))


async def complete(router: Router, *requests: GenerateRequest) -> dict[int, GenerateResult]:
    return {result.request_id: result async for result in router.generate(requests)}


def assert_whole(result: GenerateResult, num_tokens: int = 8, version: int = 0) -> None:
    """Every token once, in order, whoever generated it."""
    for sample in result.samples:
        assert sample.token_ids.tolist() == tokens(num_tokens)
        assert len(sample.log_probs) == num_tokens
        assert set(sample.weight_versions.tolist()) == {version}
        assert sample.finish_reason == "length"


@dataclass
class Run:
    """Fake servers behind a router, and their actor; a restart makes a new one at once, with the weights of version 0."""

    servers: dict[str, FakeServer]
    config: SglangEngineConfig
    restarts: list[str] = field(default_factory=list)
    resyncs: list[tuple[str, int]] = field(default_factory=list)
    comes_back: bool = True
    may_start: asyncio.Event = field(default_factory=asyncio.Event)
    held: int | None = None
    """The version that the actor holds; None: the one that the router asks for."""
    holds_weights: asyncio.Event = field(default_factory=asyncio.Event)
    """Not set while the actor trains."""

    def __post_init__(self) -> None:
        self.holds_weights.set()
        self.may_start.set()

    async def restart(self, name: str) -> EngineEndpoint:
        self.restarts.append(name)
        await self.may_start.wait()
        if not self.comes_back:
            raise EngineError("no such luck")
        self.servers[name] = FakeServer(name)
        return await self.servers[name].start()

    async def resync(self, endpoint: EngineEndpoint, version: int) -> None:
        if self.held not in (None, version) or not self.holds_weights.is_set():
            raise VersionGoneError("the actor has trained on")
        self.resyncs.append((endpoint.name, version))
        assert not self.servers[endpoint.name].prompts
        self.servers[endpoint.name].weight_version = version

    async def renew(self, endpoint: EngineEndpoint) -> int:
        await self.holds_weights.wait()
        assert self.held is not None
        await self.resync(endpoint, self.held)
        return self.held


@dataclass
class Report:
    failures: dict[str, str] = field(default_factory=dict)


@asynccontextmanager
async def fleet(
    num_servers: int = 2,
    *,
    mixes_versions: bool = False,
    may_pause: bool = False,
    experts: ExpertShape | None = None,
    **settings,
) -> AsyncIterator[tuple[Router, Run]]:
    quick = {"health_interval_seconds": 0.02, "health_deadline_seconds": 0.2, "restart_deadline_seconds": 5.0}
    servers = {f"engine {index}": FakeServer(f"engine {index}") for index in range(num_servers)}
    state = Run(servers, SglangEngineConfig(**quick | settings))
    endpoints = [await server.start() for server in servers.values()]
    router = Router(
        endpoints,
        state.config,
        lambda rows: [str(row) for row in rows],
        restart=state.restart,
        keeper=state,
        mixes_versions=mixes_versions,
        may_pause=may_pause,
        experts=experts,
    )
    try:
        yield router, state
    finally:
        await router.close()
        await asyncio.gather(*(server.die() for server in state.servers.values()))


async def update(router: Router, state: Run, version: int, failures: Sequence[str] = ()) -> None:
    async def push(endpoints: Sequence[EngineEndpoint]) -> Report:
        for endpoint in endpoints:
            state.servers[endpoint.name].memory_calls.append("update")
            if endpoint.name not in failures:
                state.servers[endpoint.name].weight_version = version
        return Report(dict.fromkeys(failures, "did not answer"))

    await router.update_weights(version, push)


async def test_groups_stay_together_and_go_where_the_least_is_to_do():
    async with fleet() as (router, state):
        long = request(0, num_samples=4, max_response_tokens=20)
        results = await complete(router, long, *(request(i, max_response_tokens=5) for i in range(1, 4)))
        assert_whole(results[0], 20)
        counts = [len(server.prompts) for server in state.servers.values()]
        assert sorted(counts) == [4, 6]  # the long group alone, the short ones beside it


async def test_requests_of_a_dead_engine_go_on_elsewhere_after_the_tokens_that_arrived():
    async with fleet() as (router, state):
        first = state.servers["engine 0"]
        first.seconds_per_token = 0.01
        work = asyncio.ensure_future(complete(router, request(0), request(1)))
        await first.generated.wait()
        await asyncio.sleep(0.03)
        await first.die()
        results = await work
        for result in results.values():
            assert_whole(result)
        continued = state.servers["engine 1"].prompts[2:]
        assert len(continued) == 2 and all(len(prompt) > len(PROMPT) for prompt in continued)
        assert router.num_engines_lost == 1


async def test_hung_engine_is_replaced_by_its_deadline():
    async with fleet() as (router, state):
        hung = state.servers["engine 0"]
        hung.hang()
        results = await complete(router, request(0), request(1))
        for result in results.values():
            assert_whole(result)
        assert state.restarts == ["engine 0"]


async def test_busy_engine_that_only_streams_slowly_is_not_taken_for_hung():
    async with fleet(1) as (router, state):
        state.servers["engine 0"].seconds_per_token = 0.06
        assert_whole((await complete(router, request(0)))[0])
        assert state.restarts == []


async def test_restarted_engine_gets_the_current_weights_before_it_serves():
    async with fleet(1) as (router, state):
        await update(router, state, 3)
        await state.servers["engine 0"].die()
        results = await complete(router, request(0))
        assert_whole(results[0], version=3)
        assert state.resyncs == [("engine 0", 3)]
        assert state.servers["engine 0"].num_flushes == 1  # prefixes of the weights it was started with


async def test_restarted_engine_that_the_actor_cannot_serve_waits_for_the_next_update():
    async with fleet() as (router, state):
        await update(router, state, 1)
        state.held = 2
        await state.servers["engine 0"].die()
        assert_whole((await complete(router, request(0), request(1)))[1], version=1)
        while state.servers["engine 0"].weight_version != 2:
            await update(router, state, 2)
            await asyncio.sleep(0.01)
        await complete(router, *(request(i) for i in range(4)))
        assert state.servers["engine 0"].prompts


@pytest.mark.parametrize("mixes_versions", [False, True])
async def test_the_only_engine_comes_back_with_the_newest_weights_when_the_actor_has_trained_on(mixes_versions: bool):
    """A rollout in flight while the actor trains (train.rollout_lag 1): nobody would send the next version before it ends."""
    async with fleet(1, mixes_versions=mixes_versions, restart_deadline_seconds=60) as (router, state):
        await update(router, state, 1)
        lost = state.servers["engine 0"]
        lost.seconds_per_token = 0.01
        work = asyncio.ensure_future(complete(router, request(0), request(1)))
        await lost.generated.wait()
        await asyncio.sleep(0.03)
        state.holds_weights.clear()
        await lost.die()
        while not state.restarts:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        assert not work.done() and router.weight_version == 1
        state.held = 2
        state.holds_weights.set()
        for result in (await work).values():
            for sample in result.samples:
                versions = sample.weight_versions.tolist()
                assert sample.token_ids.tolist() == tokens(8)
                assert versions == ([1] * versions.count(1) + [2] * versions.count(2) if mixes_versions else [2] * 8)
                assert versions[0] == (1 if mixes_versions else 2) and versions[-1] == 2
        assert router.weight_version == 2 and state.resyncs == [("engine 0", 2)]
        await update(router, state, 2)
        assert_whole((await complete(router, request(0)))[0], version=2)


async def test_an_engine_that_waits_for_the_next_update_gets_the_newest_weights_when_the_last_other_one_is_lost():
    async with fleet() as (router, state):
        await update(router, state, 1)
        state.held = 2
        await state.servers["engine 0"].die()
        assert_whole((await complete(router, request(0), request(1)))[1], version=1)
        assert state.resyncs == []
        await state.servers["engine 1"].die()
        results = await complete(router, *(request(i) for i in range(4)))
        for result in results.values():
            assert_whole(result, version=2)
        while len(router.serving) < 2:
            await asyncio.sleep(0.01)
        assert sorted(state.resyncs) == [("engine 0", 2), ("engine 1", 2)]


async def test_late_word_of_the_loss_does_not_touch_the_engine_that_came_back():
    async with fleet(1) as (router, state):
        before = router._fleet.serving[0]
        await state.servers["engine 0"].die()
        await complete(router, request(0))
        router._fleet.lose(before, EngineLostError("the connection timed out", "engine 0"))
        assert_whole((await complete(router, request(0)))[0])
        assert state.restarts == ["engine 0"] and router.num_engines_lost == 1


async def test_engine_that_fails_during_an_update_is_restarted_and_the_others_go_on():
    async with fleet() as (router, state):
        await update(router, state, 1, failures=["engine 1"])
        for result in (await complete(router, *(request(i) for i in range(4)))).values():
            assert_whole(result, version=1)
        assert state.restarts == ["engine 1"]


@pytest.mark.parametrize("error", [FingerprintError("embedding differs"), RuntimeError("embedding differs")])
async def test_wrong_weights_after_a_restart_end_the_run(error: Exception):
    async with fleet(1) as (router, state):

        async def resync(endpoint: EngineEndpoint, version: int) -> None:
            raise error

        state.resync = resync  # type: ignore[method-assign]
        await state.servers["engine 0"].die()
        with pytest.raises(type(error), match="embedding differs"):
            await complete(router, request(0))


async def test_request_that_every_engine_dies_of_ends_the_run():
    async with fleet(1, restart_deadline_seconds=60) as (router, state):

        async def dies(name: str) -> EngineEndpoint:
            state.restarts.append(name)
            state.servers[name] = FakeServer(name)
            state.servers[name].dies_of_requests = True
            return await state.servers[name].start()

        router._fleet._restart = dies
        state.servers["engine 0"].dies_of_requests = True
        with pytest.raises(EngineError, match=r"5 engines were lost one after the other with request 0 \(3 prompt tokens\)"):
            await complete(router, request(0))


async def test_fault_of_a_server_is_its_loss_and_a_refusal_ends_the_run():
    async with fleet(1) as (router, state):
        state.servers["engine 0"].status = 503
        assert_whole((await complete(router, request(0)))[0])
        assert state.restarts == ["engine 0"]
        state.servers["engine 0"].status = 400
        with pytest.raises(EngineError, match="engine 0 refuses: it answered /generate with status 400"):
            await complete(router, request(0))


async def test_tokens_of_another_weight_version_are_refused():
    async with fleet(1) as (router, state):
        state.servers["engine 0"].weight_version = 5
        with pytest.raises(EngineError, match="weight version 5, but the engines hold version 0"):
            await complete(router, request(0))


async def test_response_that_a_server_cuts_off_before_its_limit_ends_the_run():
    async with fleet(1) as (router, state):
        state.servers["engine 0"].max_request_tokens = len(PROMPT) + 6
        assert_whole((await complete(router, request(0, max_response_tokens=6)))[0], 6)
        with pytest.raises(
            EngineError, match=r"cut a response to request 0 off after 6 tokens, before its max_response_tokens \(8\)"
        ):
            await complete(router, request(0))


async def test_sample_that_a_server_ends_of_its_own_accord_goes_on_but_not_for_ever():
    async with fleet(1) as (router, state):
        server = state.servers["engine 0"]
        server.num_faults = 3
        assert_whole((await complete(router, request(0, num_samples=1)))[0])
        assert [len(prompt) - len(PROMPT) for prompt in server.prompts] == [0, 1, 2, 3]
        server.num_faults = 4
        with pytest.raises(EngineError, match="engine 0 ended request 0 4 times, last with 'Out of memory'; look at its log"):
            await complete(router, request(0, num_samples=1))


async def test_run_ends_when_no_engine_comes_back_in_time():
    async with fleet(1, restart_deadline_seconds=0.1) as (router, state):
        state.comes_back = False
        await state.servers["engine 0"].die()
        with pytest.raises(EngineError, match=r"restart_deadline_seconds \(0\); the last loss: no such luck"):
            await complete(router, request(0))


async def test_aborted_request_ends_with_what_it_has_and_goes_on_later():
    async with fleet(1) as (router, state):
        server = state.servers["engine 0"]
        server.seconds_per_token = 0.01
        work = asyncio.ensure_future(complete(router, request(0, max_response_tokens=50)))
        await server.generated.wait()
        await router.abort([0, 99])
        result = (await work)[0]
        assert not result.is_complete
        assert all(0 < len(sample.token_ids) < 50 for sample in result.samples)
        server.seconds_per_token = 0.0
        await update(router, state, 1)
        resumed = (await complete(router, request(0, max_response_tokens=50, started=result.samples)))[0]
        for before, after in zip(result.samples, resumed.samples, strict=True):
            num_old = len(before.token_ids)
            assert after.token_ids.tolist() == tokens(50)
            assert after.weight_versions.tolist() == [0] * num_old + [1] * (50 - num_old)


async def test_abort_right_after_generate_reaches_the_request():
    async with fleet(1) as (router, state):
        state.servers["engine 0"].seconds_per_token = 0.01
        work = asyncio.ensure_future(complete(router, request(0, max_response_tokens=1000)))
        await asyncio.sleep(0)
        await router.abort([0])
        assert not (await work)[0].is_complete


async def test_finished_samples_of_a_started_request_are_returned_as_they_are():
    async with fleet(1) as (router, state):
        finished = Sample([50, 2], [-1.0, -1.0], [0, 0], "stop", "x")
        begun = Sample([3], [-1.0], [0], "abort", "y")
        result = (await complete(router, request(0, started=(finished, begun))))[0]
        assert result.samples[0].token_ids.tolist() == [50, 2] and result.samples[0].finish_reason == "stop"
        assert result.samples[1].token_ids.tolist() == tokens(8)
        assert state.servers["engine 0"].prompts == [[*PROMPT, 3]]


async def test_engines_take_turns_with_the_actor_weights_first():
    async with fleet(1) as (router, state):
        server = state.servers["engine 0"]
        await update(router, state, 1)
        await complete(router, request(0))
        await router.release_memory()
        await update(router, state, 2)
        assert_whole((await complete(router, request(0)))[0], version=2)
        turn = ["release kv_cache", "release weights", "resume weights", "update", "resume kv_cache"]
        assert server.memory_calls == ["update", *turn]


async def test_memory_is_not_released_and_weights_do_not_change_under_a_request():
    async with fleet(1) as (router, state):
        state.servers["engine 0"].seconds_per_token = 0.01
        work = asyncio.ensure_future(complete(router, request(0)))
        await asyncio.sleep(0)
        with pytest.raises(EngineError, match="1 requests are in work; memory is released between rollouts only"):
            await router.release_memory()
        with pytest.raises(EngineError, match="1 requests are in work; weights are updated between rollouts only"):
            await update(router, state, 1)
        assert_whole((await work)[0])


@pytest.mark.parametrize("fails", [False, True])
async def test_no_token_is_drawn_from_weights_that_have_not_arrived(fails: bool):
    async with fleet(1) as (router, state):
        may_end = asyncio.Event()

        async def push(endpoints: Sequence[EngineEndpoint]) -> Report:
            await may_end.wait()
            raise FingerprintError("embedding differs")

        updating = asyncio.ensure_future(router.update_weights(1, push))
        await asyncio.sleep(0)
        if fails:
            may_end.set()
            with pytest.raises(FingerprintError):
                await updating
        with pytest.raises(EngineError, match="weight version 1 has not reached the engines"):
            await complete(router, request(0))
        assert state.servers["engine 0"].prompts == []
        updating.cancel()
        await asyncio.wait([updating])
        await update(router, state, 2)
        assert_whole((await complete(router, request(0)))[0], version=2)


async def test_servers_of_somebody_else_keep_their_memory_and_a_lost_one_does_not_hold_up_the_actor():
    async with fleet(2, engine_urls=("http://somewhere", "http://elsewhere")) as (router, state):
        await state.servers["engine 0"].die()
        state.may_start.clear()
        assert_whole((await complete(router, request(0), request(1)))[1])
        assert state.restarts == ["engine 0"]
        await asyncio.wait_for(router.release_memory(), 1)
        assert state.servers["engine 1"].memory_calls == []


async def test_server_that_does_not_end_what_is_aborted_is_not_waited_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("dapo_megatron.rollout.router.ABORT_DEADLINE_SECONDS", 0.1)
    async with fleet(1, health_deadline_seconds=60) as (router, state):
        work = asyncio.ensure_future(complete(router, request(0)))
        state.servers["engine 0"].may_generate.clear()
        await asyncio.sleep(0.05)
        await router.abort([0])
        assert not (await work)[0].is_complete
        state.servers["engine 0"].is_busy = True
        await update(router, state, 1)
        assert_whole((await complete(router, request(0)))[0], version=1)
        assert state.restarts == ["engine 0"], "nothing but a restart ends what it has left running"


async def test_generation_that_was_given_up_before_it_began_leaves_nothing_in_work():
    async with fleet(1) as (router, state):
        results = router.generate([request(0)])
        await results.aclose()
        await router.release_memory()
        await update(router, state, 1)
        assert_whole((await complete(router, request(0)))[0], version=1)


async def test_engine_that_comes_back_in_the_actors_turn_waits_for_the_next_one():
    async with fleet() as (router, state):
        await update(router, state, 1)
        await state.servers["engine 0"].die()
        state.may_start.clear()
        assert_whole((await complete(router, request(0), request(1)))[0], version=1)
        releasing = asyncio.ensure_future(router.release_memory())
        await asyncio.sleep(0.05)
        assert not releasing.done(), "a server that starts takes memory"
        state.held = 2
        state.may_start.set()
        await releasing
        assert state.servers["engine 0"].memory_calls == ["release kv_cache", "release weights"]
        await update(router, state, 2)
        assert state.servers["engine 0"].memory_calls[2:] == ["resume weights", "update", "resume kv_cache"]
        for result in (await complete(router, *(request(i) for i in range(4)))).values():
            assert_whole(result, version=2)
        assert state.servers["engine 0"].prompts


async def test_no_engine_is_started_in_the_actors_turn():
    async with fleet() as (router, state):
        await router.release_memory()
        router._fleet.lose(router._fleet.serving[0], EngineLostError("the node is gone", "engine 0"))
        await asyncio.sleep(0.05)
        assert state.restarts == []
        await update(router, state, 1)
        while len(router.serving) < 2:
            await asyncio.sleep(0.01)
        assert state.restarts == ["engine 0"]


async def test_nothing_is_started_again_once_the_router_is_closed():
    async with fleet(1) as (router, state):
        state.servers["engine 0"].may_generate.clear()
        work = asyncio.ensure_future(complete(router, request(0)))
        await asyncio.sleep(0.05)
        await router.close()
        with pytest.raises(EngineError, match="the engines are closed"):
            await work
        assert state.restarts == []


EXPERTS = ExpertShape(num_layers=2, top_k=2, num_experts=8)


def assert_all_experts(result: GenerateResult) -> None:
    for sample in result.samples:
        assert sample.routed_experts is not None and sample.routed_experts.dtype == np.uint8
        expected = routed_experts(0, len(PROMPT) + len(sample.token_ids) - 1)
        np.testing.assert_array_equal(sample.routed_experts, expected)


async def test_samples_have_the_experts_of_all_tokens_but_the_last_one():
    async with fleet(1, experts=EXPERTS) as (router, _):
        assert_all_experts((await complete(router, request(0)))[0])
    async with fleet(1) as (router, _):
        assert all(sample.routed_experts is None for sample in (await complete(router, request(0)))[0].samples)


async def test_experts_of_an_aborted_request_are_kept_and_the_rest_is_added():
    async with fleet(1, experts=EXPERTS) as (router, state):
        server = state.servers["engine 0"]
        server.seconds_per_token = 0.01
        work = asyncio.ensure_future(complete(router, request(0, max_response_tokens=50)))
        await server.generated.wait()
        await asyncio.sleep(0.03)
        await router.abort([0])
        started = (await work)[0].samples
        assert all(0 < len(sample.routed_experts) == len(PROMPT) + len(sample.token_ids) - 1 for sample in started)
        server.seconds_per_token = 0.0
        bare = replace(started[0], routed_experts=None)  # aborted while it waited: the server says nothing of its experts
        resumed = (await complete(router, request(0, max_response_tokens=50, started=(bare, started[1]))))[0]
        assert_whole(resumed, 50)
        assert_all_experts(resumed)


async def test_experts_of_a_dead_engine_are_asked_of_the_next_one():
    async with fleet(experts=EXPERTS) as (router, state):
        first = state.servers["engine 0"]
        first.seconds_per_token = 0.01
        work = asyncio.ensure_future(complete(router, request(0), request(1)))
        await first.generated.wait()
        await asyncio.sleep(0.03)
        await first.die()
        for result in (await work).values():
            assert_whole(result)
            assert_all_experts(result)


async def test_last_token_is_drawn_again_when_the_engine_died_before_it_said_where_tokens_went():
    partial = PartialSample(PROMPT, Sample(tokens(8), [-0.5] * 8, [0] * 8, "abort", ""), EXPERTS)
    partial.finish_if_complete(SamplingParams(max_response_tokens=8))
    assert not partial.is_finished and partial.token_ids == tokens(7)
    async with fleet(1, experts=EXPERTS) as (router, _):
        result = (await complete(router, request(0, num_samples=1, started=(partial.sample(""),))))[0]
        assert_whole(result)
        assert_all_experts(result)


async def test_server_that_does_not_say_where_tokens_went_is_an_error(monkeypatch: pytest.MonkeyPatch):
    async with fleet(1, experts=EXPERTS) as (router, _):
        monkeypatch.setattr("tests.unit.fake_server.routed_experts", lambda start, end: routed_experts(start, end - 1))
        with pytest.raises(EngineError, match=r"routed experts of 9 tokens of 10; start it with --enable-return-routed-experts"):
            await complete(router, request(0))


async def test_servers_without_room_for_the_longest_request_are_refused():
    server = FakeServer("engine 0")
    endpoint = await server.start()
    try:
        await require_room([endpoint], 4090)
        with pytest.raises(EngineError, match="engine 0 has room for 4090 tokens a request.*are 4091"):
            await require_room([endpoint], 4091)
        server.info["max_total_num_tokens"] = 3000
        with pytest.raises(EngineError, match="engine 0 has room for 2998 tokens"):
            await require_room([endpoint], 4090)
    finally:
        await server.die()


def test_experts_that_the_model_does_not_have_are_refused():
    for rows, words in (
        (np.full((1, 2, 2), 8), "experts 8 .. 8, but the model has 8"),
        (np.full((1, 3, 1), 0), "no table of 2 layers x 2 experts"),
    ):
        with pytest.raises(EngineError, match=words):
            EXPERTS.decode(base64.b64encode(rows.astype(np.int32).tobytes()).decode())


def test_shape_of_experts_is_read_from_the_models_config():
    assert ExpertShape.of({"num_hidden_layers": 3, "num_experts": 384, "num_experts_per_tok": 4}) == ExpertShape(3, 4, 384)
    assert ExpertShape(3, 4, 384).dtype == np.uint16 and ExpertShape(3, 4, 256).dtype == np.uint8
    assert ExpertShape.of({"num_hidden_layers": 3}) is None
