"""The streaming sampler over simulated engines that draw a token of every sample each time the event loop comes round."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace

import pytest
from pydantic import TypeAdapter

from dapo_megatron.rollout.engine import GenerateRequest, GenerateResult, HoldsNothing, SamplingParams
from dapo_megatron.rollout.sampler import RolloutBatch, SamplerRules, SamplerState, UnfinishedGroup
from dapo_megatron.rollout.streaming_sampler import StreamingSampler
from dapo_megatron.rollout.wave_sampler import WaveSampler
from dapo_megatron.types import EngineError, Prompt, Sample, Score, SignalError

G, LIMIT = 4, 200
_STATE = TypeAdapter(SamplerState)


class TickEngine(HoldsNothing):
    """A fake: sample i of a prompt (k, n) says "right" when i < k and ends after n + i tokens, each drawn in one tick.

    Token t of sample i is 100 * i + t, its log-prob minus the weight version.
    """

    def __init__(self, weight_version: int = 0):
        self.weight_version = weight_version
        self.requests: list[GenerateRequest] = []
        self.num_drawn = self.most_in_flight = 0
        self.drawn_at_start: list[int] = []
        self._in_flight: set[int] = set()
        self._aborted: set[int] = set()

    async def generate(self, requests):
        (request,) = requests
        self.requests.append(request)
        self.drawn_at_start.append(self.num_drawn)
        self._in_flight.add(request.request_id)
        self._aborted.discard(request.request_id)
        self.most_in_flight = max(self.most_in_flight, len(self._in_flight))
        versions = [list(sample.weight_versions) for sample in request.started] or [[] for _ in range(request.num_samples)]
        ends = [min(request.prompt_token_ids[1] + index, request.params.max_response_tokens) for index in range(G)]
        while request.request_id not in self._aborted and any(len(v) < end for v, end in zip(versions, ends, strict=True)):
            for of_sample, end in zip(versions, ends, strict=True):
                if len(of_sample) < end:
                    of_sample.append(self.weight_version)
                    self.num_drawn += 1
            await asyncio.sleep(0)
        self._in_flight.discard(request.request_id)
        yield GenerateResult(
            request.request_id,
            tuple(
                Sample(
                    token_ids=[100 * index + at for at in range(len(of_sample))],
                    log_probs=[-float(version) for version in of_sample],
                    weight_versions=of_sample,
                    finish_reason="stop" if len(of_sample) == end else "abort",
                    text="right" if index < request.prompt_token_ids[0] else "wrong",
                )
                for index, (of_sample, end) in enumerate(zip(versions, ends, strict=True))
            ),
        )

    async def abort(self, request_ids):
        self._aborted |= self._in_flight & set(request_ids)


class HoldingEngine(TickEngine):
    """A fake that says what it is to hold, and of which seven tokens come later."""

    def __init__(self, weight_version: int = 0):
        super().__init__(weight_version)
        self.held: list[set[int]] = []
        self.aborted: list[set[int]] = []
        self.let_go_of: list[set[int]] = []

    async def abort(self, request_ids):
        self.aborted.append(set(request_ids))
        await super().abort(request_ids)

    async def hold(self, request_ids):
        self.held.append(set(request_ids))
        await super().abort(request_ids)

    async def let_go(self, request_ids):
        self.let_go_of.append(set(request_ids))
        return 7


class FakeScorer:
    """A fake: "right" is correct."""

    async def score(self, responses, answer):
        await asyncio.sleep(0)
        return tuple(Score(float(response == "right"), response == "right") for response in responses)


class Prompts:
    """Prompts with so many correct samples and so many tokens, again and again; `asked` counts them."""

    def __init__(self, *groups: tuple[int, int]):
        self.groups, self.asked = groups, 0

    def next(self) -> Prompt:
        self.asked += 1
        return Prompt(self.asked - 1, self.groups[(self.asked - 1) % len(self.groups)], "", "")


def rules(**changes) -> SamplerRules:
    params = SamplingParams(max_response_tokens=LIMIT)
    return replace(SamplerRules(num_samples_per_prompt=G, params=params, seed=3), **changes)


def sampler(engines, prompts: Prompts, state: SamplerState | None = None, **changes) -> StreamingSampler:
    return StreamingSampler(engines, FakeScorer(), prompts, rules(**changes), state)


def tokens_of(state: SamplerState) -> int:
    return sum(group.num_tokens for group in (*state.surplus, *state.unfinished))


async def test_the_step_ends_with_the_group_that_fills_it_and_the_rest_is_aborted():
    engine = TickEngine()
    streaming = sampler([engine], Prompts((2, 5), (2, 100), (2, 7), (2, 100)), in_flight_margin=1.0)
    batch = await streaming.collect(4)
    assert [group.group_id for group in batch.groups] == [0, 2, 4, 6]
    assert engine.num_drawn < 8 * 4 * 20, "nobody waited for the responses of 100 tokens"
    assert batch.stats.num_tokens_generated == engine.num_drawn
    assert batch.stats.num_groups_unfinished == 4
    assert batch.stats.num_tokens_aborted == engine.num_drawn - batch.stats.num_tokens_used > 0


async def test_a_group_without_signal_is_replaced_while_others_still_generate():
    engine = TickEngine()
    batch = await sampler([engine], Prompts((0, 3), (2, 60), (4, 3), (2, 60), (2, 60), (2, 60))).collect(4)
    assert [group.group_id for group in batch.groups] == [1, 3, 4, 5]
    drawn_before = dict(zip([request.request_id for request in engine.requests], engine.drawn_at_start, strict=True))
    assert drawn_before[4] < 150, "the two of 60 tokens had drawn a few when the third one came"


async def test_groups_in_flight_follow_the_acceptance_rate_and_the_margin():
    for rate, margin, most in ((1.0, 0.0, 8), (0.5, 0.0, 16), (0.25, 0.5, 48)):
        engine = TickEngine()
        await sampler([engine], Prompts((2, 5)), SamplerState(acceptance_rate=rate), in_flight_margin=margin).collect(8)
        assert engine.most_in_flight == most


async def test_groups_go_to_the_engine_with_the_fewest_in_flight():
    engines = [TickEngine(), TickEngine(), TickEngine()]
    await sampler(engines, Prompts((2, 5))).collect(9)
    assert [len(engine.requests) for engine in engines] == [3, 3, 3]


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("num_engines", [1, 2])
async def test_every_group_and_token_is_accounted_for(partial: bool, num_engines: int):
    chance = random.Random(7)
    groups = [(chance.choice([0, 1, 1, 2, 3, 4]), chance.choice([3, 5, 8, 40, 120])) for _ in range(50)]
    engines = [TickEngine() for _ in range(num_engines)]
    changes = {"partial_rollout": partial, "in_flight_margin": 0.6, "accuracy_max": 0.5, "max_over_sampling": 4.0}
    streaming = sampler(engines, Prompts(*groups), **changes)
    seen = dict.fromkeys(("aborted", "stale", "out_of_band", "unfinished", "surplus_kept", "zero_variance"), 0)
    for step in range(20):
        before, drawn = streaming.state(), sum(engine.num_drawn for engine in engines)
        stats = (await streaming.collect(5)).stats
        assert stats.num_tokens_generated == sum(engine.num_drawn for engine in engines) - drawn
        assert stats.num_tokens_generated + tokens_of(before) == stats.num_tokens_used + sum(
            getattr(stats, f"num_tokens_{fate}") for fate in seen
        )
        assert stats.num_tokens_surplus_kept + stats.num_tokens_unfinished == tokens_of(streaming.state())
        assert stats.num_groups_generated + len(before.surplus) == (
            stats.num_groups_kept
            + stats.num_groups_zero_variance
            + stats.num_groups_out_of_band
            + stats.num_groups_stale
            + stats.num_groups_surplus_kept
        )
        for fate in seen:
            seen[fate] += getattr(stats, f"num_tokens_{fate}")
        for engine in engines:
            engine.weight_version += step % 2 + step % 3
    absent = {"unfinished"} if not partial else {"aborted"}
    assert {fate for fate, tokens in seen.items() if not tokens} <= absent | {"surplus_kept"}, seen


async def test_a_kept_group_goes_on_under_the_new_weights_with_its_old_tokens():
    engine, prompts = TickEngine(weight_version=5), Prompts((2, 50), (2, 4), (2, 4))
    streaming = sampler([engine], prompts, partial_rollout=True, in_flight_margin=0.5)
    first = await streaming.collect(2)
    (kept,) = streaming.state().unfinished
    assert (kept.group_id, kept.num_tokens) == (0, first.stats.num_tokens_unfinished) and kept.num_tokens > 0
    assert first.stats.num_tokens_aborted == 0
    engine.weight_version = 6
    second = await streaming.collect(3)
    (group,) = [group for group in second.groups if group.group_id == 0]
    for sample, before in zip(group.samples, kept.samples, strict=True):
        already = len(before.token_ids)
        assert sample.weight_versions.tolist() == [5] * already + [6] * (len(sample.token_ids) - already)
        assert sample.log_probs[:already].tolist() == before.log_probs.tolist()
        assert sample.token_ids.tolist() == [100 * group.samples.index(sample) + at for at in range(len(sample.token_ids))]
    assert (group.oldest_weight_version, second.stats.num_tokens_stale) == (5, 0)


@pytest.mark.parametrize(("max_staleness", "lag", "goes_on"), [(1, 0, False), (2, 0, True), (2, 1, False), (3, 1, True)])
async def test_tokens_of_an_unfinished_group_that_got_too_old_are_dropped_and_the_prompt_is_asked_again(
    max_staleness: int, lag: int, goes_on: bool
):
    engine = TickEngine()
    changes = {"partial_rollout": True, "in_flight_margin": 0.5, "max_staleness": max_staleness, "lag": lag}
    streaming = sampler([engine], Prompts((2, 50), (2, 4), (2, 4)), **changes)
    await streaming.collect(2)
    (kept,) = streaming.state().unfinished
    engine.weight_version = 2
    batch = await streaming.collect(3)
    assert [request.started for request in engine.requests if request.request_id == 0][-1] == (kept.samples if goes_on else ())
    assert batch.stats.num_tokens_stale == (0 if goes_on else kept.num_tokens)
    assert batch.groups[0].oldest_weight_version == (0 if goes_on else 2)


async def test_engine_holds_what_may_be_trained_on_in_the_next_step_and_aborts_the_rest():
    engine = HoldingEngine(weight_version=5)
    streaming = sampler([engine], Prompts((2, 90), (2, 4), (2, 4), (2, 60)), partial_rollout=True, in_flight_margin=1.0)
    await streaming.collect(2)
    assert engine.held == [{0, 3}] and not engine.aborted
    engine.weight_version = 6
    streaming._rules = replace(streaming._rules, in_flight_margin=2.0)
    await streaming.collect(2)
    assert engine.aborted == [{0, 3}], "after another step their tokens of version 5 would be too old"
    assert engine.held[1:] and not engine.held[1] & {0, 3}
    assert engine.let_go_of == []


async def test_groups_that_engines_hold_are_asked_for_first_however_few_are_needed():
    engine = HoldingEngine()
    prompts = Prompts((2, 60), (2, 60), (2, 4), (2, 4), (2, 60), (2, 60))
    streaming = sampler([engine], prompts, partial_rollout=True, in_flight_margin=2.0)
    await streaming.collect(2)
    held = engine.held[0]
    assert len(held) == 4
    engine.weight_version, streaming._rules = 1, replace(streaming._rules, in_flight_margin=0.0)
    num_before = len(engine.requests)
    await streaming.collect(1)
    assert {request.request_id for request in engine.requests[num_before:]} == held


async def test_held_groups_that_got_too_old_are_let_go_and_what_came_since_is_stale():
    engine = HoldingEngine()
    streaming = sampler([engine], Prompts((2, 50), (2, 4), (2, 4)), partial_rollout=True, in_flight_margin=0.5)
    await streaming.collect(2)
    (kept,) = streaming.state().unfinished
    engine.weight_version, drawn = 2, engine.num_drawn
    stats = (await streaming.collect(3)).stats
    assert engine.let_go_of == [{kept.group_id}]
    assert stats.num_tokens_stale == kept.num_tokens + 7
    assert stats.num_tokens_generated == engine.num_drawn - drawn + 7


@pytest.mark.parametrize("partial", [False, True])
async def test_no_prompt_is_lost_however_long_its_responses(partial: bool):
    engine, prompts = TickEngine(), Prompts((2, 150), (2, 3), (2, 5), (1, 4), (3, 3))
    streaming = sampler([engine], prompts, partial_rollout=partial, in_flight_margin=1.0, max_staleness=100)
    used = set()
    for _ in range(12):
        used |= {group.group_id for group in (await streaming.collect(4)).groups}
        engine.weight_version += 1
    state = streaming.state()
    held = {group.group_id for group in (*state.surplus, *state.unfinished)}
    assert used | held == set(range(prompts.asked)) and not used & held
    assert any(group_id % 5 == 0 for group_id in used), "long responses are trained on too"


async def test_a_group_that_completes_while_the_step_is_stopped_is_surplus():
    streaming = sampler([TickEngine()], Prompts((2, 5)), SamplerState(acceptance_rate=0.5))
    batch = await streaming.collect(2)
    assert len(batch.groups) == 2
    assert [group.group_id for group in streaming.state().surplus] == [2, 3]
    again = await streaming.collect(3)
    assert again.stats.num_groups_surplus_used == 2 and again.stats.num_groups_stale == 0


async def test_restored_sampler_goes_on_with_what_was_unfinished():
    async def run(restart: bool) -> tuple[RolloutBatch, SamplerState]:
        engine, prompts = TickEngine(), Prompts((2, 50), (2, 4), (0, 9), (1, 4))
        streaming = sampler([engine], prompts, partial_rollout=True, in_flight_margin=1.0)
        await streaming.collect(2)
        if restart:
            state = _STATE.validate_json(_STATE.dump_json(streaming.state()))
            assert state == streaming.state() and state.unfinished
            streaming = sampler([TickEngine()], prompts, state, partial_rollout=True, in_flight_margin=1.0)
        return await streaming.collect(4), streaming.state()

    assert await run(restart=True) == await run(restart=False)


async def test_tokens_that_a_run_with_partial_rollouts_left_do_not_go_on_in_one_without():
    prompts = Prompts((2, 50), (2, 4), (2, 4))
    streaming = sampler([TickEngine()], prompts, partial_rollout=True, in_flight_margin=0.5)
    await streaming.collect(2)
    (kept,) = streaming.state().unfinished
    engine = TickEngine(weight_version=1)
    batch = await sampler([engine], prompts, streaming.state()).collect(3)
    assert kept.num_tokens == batch.stats.num_tokens_aborted > 0
    assert all(request.started == () for request in engine.requests) and batch.groups[0].group_id == kept.group_id
    assert {version for group in batch.groups for sample in group.samples for version in sample.weight_versions} == {1}


async def test_waves_after_a_stream_count_what_was_kept_as_aborted():
    state = SamplerState(
        4, 1.0, (), (UnfinishedGroup(3, Prompt(3, (2, 9), "", ""), (Sample((1,), (0.0,), (0,), "abort", ""),) * G),)
    )
    waves = WaveSampler([TickEngine()], FakeScorer(), Prompts((2, 5)), rules(), state)
    waves._rules = replace(waves._rules, max_over_sampling=1.0)
    stats = (await waves.collect(0)).stats
    assert stats.num_tokens_aborted == G and waves.state().unfinished == ()


async def test_data_without_signal_ends_in_a_smaller_step_with_a_warning(caplog: pytest.LogCaptureFixture):
    batch = await sampler([TickEngine()], Prompts((0, 3), (0, 5), (2, 4), (4, 2)), max_over_sampling=2.0).collect(4)
    assert [group.group_id for group in batch.groups] == [2, 6]
    assert batch.stats.limit_reached and batch.stats.num_groups_generated == 8
    assert "The step has 2 of 4 groups: too few of 8 generated ones" in caplog.text


@pytest.mark.parametrize("kind", [StreamingSampler, WaveSampler])
async def test_data_without_signal_ends_the_run_when_asked(kind):
    class WholeCalls(TickEngine):
        """Waves ask for many requests at once."""

        async def generate(self, requests):
            for request in requests:
                async for result in super().generate([request]):
                    yield result

    asked = kind([WholeCalls()], FakeScorer(), Prompts((0, 3)), rules(on_limit="error", max_over_sampling=2.0))
    with pytest.raises(SignalError, match=r"0 of 4 groups.*max_over_sampling 2.*rollout.on_limit smaller_step"):
        await asked.collect(4)


async def test_groups_outside_the_band_are_dropped_and_counted_apart():
    prompts = Prompts((1, 4), (2, 4), (3, 4), (4, 4))
    batch = await sampler([TickEngine()], prompts, accuracy_min=0.3, accuracy_max=0.5).collect(3)
    assert [group.accuracy for group in batch.groups] == [0.5] * 3
    assert batch.stats.num_groups_out_of_band >= 4 and batch.stats.num_tokens_out_of_band > 0
    assert batch.stats.num_groups_zero_variance == batch.stats.num_groups_all_correct >= 2


async def test_error_of_an_engine_ends_the_step_as_it_is():
    class DyingEngine(TickEngine):
        """A fake that fails at the third request."""

        async def generate(self, requests):
            if len(self.requests) == 2:
                raise EngineError("engine 1 is gone")
            async for result in super().generate(requests):
                yield result

    with pytest.raises(EngineError, match="engine 1 is gone"):
        await sampler([TickEngine(), DyingEngine()], Prompts((2, 20))).collect(8)


async def test_request_that_an_engine_leaves_out_is_an_error():
    class ForgetfulEngine(TickEngine):
        """A fake that answers nothing."""

        async def generate(self, requests):
            return
            yield

    with pytest.raises(EngineError, match="left out request"):
        await sampler([ForgetfulEngine()], Prompts((2, 20))).collect(4)


async def test_without_dynamic_sampling_exactly_the_groups_asked_for_are_generated():
    engine = TickEngine()
    batch = await sampler([engine], Prompts((0, 3), (4, 9), (2, 5)), dynamic_sampling=False).collect(3)
    assert [group.accuracy for group in batch.groups] == [0, 1, 0.5] and len(engine.requests) == 3
