"""Dynamic sampling over a fake engine: what a step is made of, whatever the order in which groups complete."""

from __future__ import annotations

import asyncio
import pickle
from dataclasses import replace

import pytest

from dapo_megatron.rollout.engine import GenerateRequest, GenerateResult, SamplingParams
from dapo_megatron.rollout.groups import request_seed
from dapo_megatron.rollout.sampler import SamplerRules, SamplerState
from dapo_megatron.rollout.wave_sampler import WaveSampler
from dapo_megatron.types import EngineError, Prompt, Sample, Score

G = 4


class FakeEngine:
    """A fake: sample i of a prompt that starts with token k says "right" when i < k and has 1 + i tokens. Completes the
    requests of a call in the order that `order` (a sort key) gives, and keeps what it was asked."""

    def __init__(self, order=lambda request: request.request_id, weight_version: int = 0):
        self.order, self.weight_version = order, weight_version
        self.calls: list[list[GenerateRequest]] = []

    async def generate(self, requests):
        self.calls.append(list(requests))
        for request in sorted(requests, key=self.order):
            await asyncio.sleep(0)
            yield GenerateResult(request.request_id, tuple(self._sample(request, index) for index in range(request.num_samples)))

    def _sample(self, request: GenerateRequest, index: int) -> Sample:
        num_tokens = 1 + index
        text = "right" if index < request.prompt_token_ids[0] else "wrong"
        reason = "length" if index == G - 1 else "stop"
        return Sample((5,) * num_tokens, (-0.5,) * num_tokens, (self.weight_version,) * num_tokens, reason, text)


class FakeScorer:
    """A fake: "right" is correct; the reward falls with the place in the group, as overlong shaping would make it."""

    async def score(self, responses, answer):
        return tuple(
            Score(1.0 - 0.1 * place, response == "right", "timeout" if answer == "slow" else None)
            for place, response in enumerate(responses)
        )


class Prompts:
    """Prompts whose groups have `num_correct[i]` correct samples, again and again."""

    def __init__(self, num_correct: list[int], answer: str = ""):
        self.num_correct, self.answer, self.position = num_correct, answer, 0

    def next(self) -> Prompt:
        index = self.position % len(self.num_correct)
        self.position += 1
        return Prompt(index, (self.num_correct[index], 1), "", self.answer)


def rules(**changes) -> SamplerRules:
    return replace(SamplerRules(num_samples_per_prompt=G, params=SamplingParams(), seed=3), **changes)


def num_tokens(groups) -> int:
    return sum(group.num_tokens for group in groups)


async def test_only_groups_with_mixed_accuracy_are_kept_in_the_order_of_group_ids():
    sampler = WaveSampler([FakeEngine()], FakeScorer(), Prompts([0, 1, 4, 2, 3]), rules())
    batch = await sampler.collect(6)
    assert [0 < group.accuracy < 1 for group in batch.groups] == [True] * 6
    assert [group.group_id for group in batch.groups] == [1, 3, 4, 6, 8, 9]
    assert not batch.stats.limit_reached


async def test_all_correct_group_is_dropped_although_its_shaped_rewards_differ():
    sampler = WaveSampler([FakeEngine()], FakeScorer(), Prompts([4, 2]), rules())
    batch = await sampler.collect(3)
    assert {group.accuracy for group in batch.groups} == {0.5}
    assert batch.stats.num_groups_all_correct == batch.stats.num_groups_zero_variance > 0


@pytest.mark.parametrize(("num_correct", "counter"), [(4, "num_groups_all_correct"), (0, "num_groups_all_wrong")])
async def test_data_without_signal_ends_in_an_empty_step_with_a_warning(num_correct, counter, caplog):
    sampler = WaveSampler([FakeEngine()], FakeScorer(), Prompts([num_correct]), rules(max_over_sampling=2.5))
    batch = await sampler.collect(4)
    assert batch.groups == ()
    assert batch.stats.limit_reached
    assert batch.stats.num_groups_generated == getattr(batch.stats, counter) == 10
    assert "The step has 0 of 4 groups" in caplog.text


async def test_scarce_signal_ends_in_a_smaller_step(caplog):
    sampler = WaveSampler([FakeEngine()], FakeScorer(), Prompts([0] * 9 + [1]), rules(max_over_sampling=5))
    batch = await sampler.collect(4)
    assert [group.group_id for group in batch.groups] == [9, 19]
    assert batch.stats.num_groups_generated == 20
    assert "The step has 2 of 4 groups" in caplog.text


async def test_without_dynamic_sampling_every_group_is_kept_and_none_generated_in_vain():
    engine = FakeEngine()
    state = SamplerState(acceptance_rate=0.25)
    sampler = WaveSampler([engine], FakeScorer(), Prompts([0, 4, 2]), rules(dynamic_sampling=False), state)
    batch = await sampler.collect(3)
    assert [group.accuracy for group in batch.groups] == [0, 1, 0.5]
    assert (batch.stats.num_groups_generated, len(engine.calls)) == (3, 1)
    assert batch.stats.num_groups_zero_variance == batch.stats.num_tokens_zero_variance == 0
    assert (batch.stats.num_groups_all_correct, batch.stats.num_groups_all_wrong) == (1, 1)


@pytest.mark.parametrize("num_engines", [1, 2, 3])
async def test_order_of_completion_does_not_change_the_outcome(num_engines):
    async def run(order) -> tuple:
        sampler = WaveSampler([FakeEngine(order) for _ in range(num_engines)], FakeScorer(), Prompts([0, 1, 2, 4, 3, 4]), rules())
        return [await sampler.collect(5) for _ in range(3)], sampler.state()

    assert await run(lambda request: request.request_id) == await run(lambda request: -request.request_id)


async def test_number_of_engines_does_not_change_what_a_sample_is_drawn_from():
    async def requests(num_engines: int) -> list[GenerateRequest]:
        engines = [FakeEngine() for _ in range(num_engines)]
        await WaveSampler(engines, FakeScorer(), Prompts([0, 1]), rules()).collect(4)
        return sorted((r for engine in engines for call in engine.calls for r in call), key=lambda r: r.request_id)

    assert await requests(1) == await requests(3)


async def test_groups_are_dealt_to_engines_in_turn():
    engines = [FakeEngine(), FakeEngine()]
    await WaveSampler(engines, FakeScorer(), Prompts([1]), rules()).collect(5)
    assert [[request.request_id for request in engine.calls[0]] for engine in engines] == [[0, 2, 4], [1, 3]]


async def test_surplus_is_used_first_and_leaves_less_to_generate():
    sampler = WaveSampler([FakeEngine()], FakeScorer(), Prompts([1]), rules(), SamplerState(acceptance_rate=0.5))
    first = await sampler.collect(4)
    assert [group.group_id for group in sampler.state().surplus] == [4, 5, 6, 7]
    second = await sampler.collect(6)
    assert first.stats.num_groups_surplus_kept == second.stats.num_groups_surplus_used == 4
    assert [group.group_id for group in second.groups] == [4, 5, 6, 7, 8, 9]


async def test_step_filled_by_surplus_alone_has_no_means():
    sampler = WaveSampler([FakeEngine()], FakeScorer(), Prompts([1]), rules(), SamplerState(acceptance_rate=0.5))
    await sampler.collect(4)
    stats = (await sampler.collect(3)).stats
    assert (stats.num_groups_generated, stats.num_groups_surplus_used, stats.num_groups_surplus_kept) == (0, 3, 1)
    assert stats.accuracy is stats.reward is stats.truncated_fraction is None


@pytest.mark.parametrize(("max_staleness", "num_updates", "num_stale"), [(0, 0, 0), (0, 1, 4), (1, 1, 0), (1, 2, 4), (2, 2, 0)])
async def test_surplus_older_than_max_staleness_is_dropped(max_staleness, num_updates, num_stale):
    engine = FakeEngine(weight_version=7)
    state = SamplerState(acceptance_rate=0.5)
    sampler = WaveSampler([engine], FakeScorer(), Prompts([1]), rules(max_staleness=max_staleness), state)
    await sampler.collect(4)
    engine.weight_version += num_updates
    batch = await sampler.collect(4)
    assert batch.stats.num_groups_stale == num_stale
    assert all(group.oldest_weight_version >= engine.weight_version - max_staleness for group in batch.groups)


async def test_every_group_and_token_is_accounted_for():
    engines = [FakeEngine(), FakeEngine()]
    sampler = WaveSampler(engines, FakeScorer(), Prompts([0, 1, 1, 4, 2, 0, 3]), rules(max_staleness=0), SamplerState(0, 0.3))
    num_groups_before = num_tokens_before = 0
    for step in range(8):
        batch = await sampler.collect(5)
        stats = batch.stats
        assert stats.num_tokens_generated == stats.num_groups_generated * (1 + 2 + 3 + 4)
        assert stats.num_tokens_used == num_tokens(batch.groups)
        assert stats.num_groups_generated + num_groups_before == (
            stats.num_groups_kept + stats.num_groups_zero_variance + stats.num_groups_stale + stats.num_groups_surplus_kept
        )
        assert stats.num_tokens_generated + num_tokens_before == (
            stats.num_tokens_used + stats.num_tokens_zero_variance + stats.num_tokens_stale + stats.num_tokens_surplus_kept
        )
        num_groups_before, num_tokens_before = stats.num_groups_surplus_kept, stats.num_tokens_surplus_kept
        for engine in engines:
            engine.weight_version += step % 2


async def test_means_are_over_all_generated_groups_not_over_those_kept():
    stats = (await WaveSampler([FakeEngine()], FakeScorer(), Prompts([4, 4, 1, 4], "slow"), rules()).collect(2)).stats
    assert stats.num_groups_generated > stats.num_groups_kept == 2
    num_correct = sum([4, 4, 1, 4][index % 4] for index in range(stats.num_groups_generated))
    assert stats.accuracy == pytest.approx(num_correct / (G * stats.num_groups_generated))
    assert stats.reward == pytest.approx(1 - 0.1 * 1.5)
    assert stats.response_length_tokens == 2.5
    assert stats.truncated_fraction == 1 / G
    assert stats.num_samples_scored_by_default == G * stats.num_groups_generated


async def test_acceptance_rate_makes_later_waves_fit_the_need():
    engine = FakeEngine()
    sampler = WaveSampler([engine], FakeScorer(), Prompts([0, 0, 0, 1]), rules(max_over_sampling=100))
    for _ in range(12):
        await sampler.collect(8)
    assert sampler.state().acceptance_rate == pytest.approx(0.25, abs=0.06)
    engine.calls.clear()
    await sampler.collect(8)
    assert len(engine.calls) <= 2


async def test_restored_sampler_goes_on_like_the_one_that_was_saved():
    prompts = Prompts([0, 1, 4, 2, 3, 4])
    sampler = WaveSampler([FakeEngine()], FakeScorer(), prompts, rules(), SamplerState(acceptance_rate=0.3))
    await sampler.collect(3)
    state = pickle.loads(pickle.dumps(sampler.state()))
    assert state.surplus
    restored_prompts = Prompts(prompts.num_correct)
    restored_prompts.position = prompts.position
    restored = WaveSampler([FakeEngine()], FakeScorer(), restored_prompts, rules(), state)
    assert [await restored.collect(3) for _ in range(3)] == [await sampler.collect(3) for _ in range(3)]
    assert restored.state() == sampler.state()


async def test_groups_are_scored_while_others_still_generate():
    events = []

    class SlowEngine(FakeEngine):
        """A fake that lets other tasks run between two results."""

        async def generate(self, requests):
            async for result in super().generate(requests):
                events.append(("generated", result.request_id))
                yield result
                await asyncio.sleep(0.001)

    class LoggingScorer(FakeScorer):
        """A fake that notes when it is called."""

        async def score(self, responses, answer):
            events.append(("scored", None))
            return await super().score(responses, answer)

    await WaveSampler([SlowEngine()], LoggingScorer(), Prompts([1]), rules()).collect(3)
    assert events.index(("scored", None)) < events.index(("generated", 2))


async def test_error_of_an_engine_ends_the_step_as_it_is_and_stops_the_other_engines():
    closed = []

    class DyingEngine(FakeEngine):
        """A fake that fails at once."""

        async def generate(self, requests):
            raise EngineError("engine 1 is gone")
            yield

    class EndlessEngine(FakeEngine):
        """A fake that never completes a request."""

        async def generate(self, requests):
            try:
                await asyncio.Event().wait()
                yield
            finally:
                closed.append(True)

    with pytest.raises(EngineError, match="engine 1 is gone"):
        await WaveSampler([EndlessEngine(), DyingEngine()], FakeScorer(), Prompts([1]), rules()).collect(4)
    assert closed == [True]


async def test_request_that_an_engine_leaves_out_is_an_error():
    class ForgetfulEngine(FakeEngine):
        """A fake that answers all requests but the first."""

        async def generate(self, requests):
            async for result in super().generate(requests[1:]):
                yield result

    with pytest.raises(EngineError, match="left out 1 of 4 requests, first 0"):
        await WaveSampler([ForgetfulEngine()], FakeScorer(), Prompts([1]), rules()).collect(4)


async def test_engines_with_different_weights_are_refused():
    engines = [FakeEngine(weight_version=1), FakeEngine(weight_version=2)]
    with pytest.raises(EngineError, match=r"weight versions \[1, 2\]"):
        await WaveSampler(engines, FakeScorer(), Prompts([1]), rules()).collect(1)


def test_request_seeds_are_stable_and_distinct():
    seeds = {request_seed(run_seed, group_id) for run_seed in range(20) for group_id in range(200)}
    assert len(seeds) == 4000
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert request_seed(0, 0) == 3560153452049741418
