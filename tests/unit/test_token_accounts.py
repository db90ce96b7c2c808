"""Every token that comes from a server has one end in the metrics, whatever becomes of the server."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields

import pytest

from dapo_megatron.eval.measure import Protocol, held_out_metrics
from dapo_megatron.rollout import sglang_engine
from dapo_megatron.rollout.engine import SamplingParams
from dapo_megatron.rollout.partial_sample import PartialSample
from dapo_megatron.rollout.router import Router
from dapo_megatron.rollout.sampler import Sampler, SamplerRules
from dapo_megatron.rollout.sampler_stats import SamplerStats
from dapo_megatron.rollout.sglang_engine import Piece
from dapo_megatron.rollout.streaming_sampler import StreamingSampler
from dapo_megatron.rollout.wave_sampler import WaveSampler
from dapo_megatron.types import Prompt, Sample, Score
from tests.unit.fake_server import FakeServer
from tests.unit.test_router import EXPERTS, PROMPT, fleet, request, tokens, update

ENDS = ("used", "zero_variance", "out_of_band", "stale", "aborted", "redrawn", "surplus_kept", "unfinished")
HELD_OVER = ("surplus_kept", "unfinished")


def test_law_names_every_counter_of_the_stats():
    counters = {field.name for field in fields(SamplerStats) if field.name.startswith("num_tokens_")}
    assert counters == {f"num_tokens_{name}" for name in (*ENDS, "generated")}


@dataclass
class Arrivals:
    """Tokens that servers sent and the client read."""

    num_tokens: int = 0


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Arrivals]:
    arrivals, read = Arrivals(), sglang_engine._piece

    def piece(event: dict, num_before: int) -> Piece:
        found = read(event, num_before)
        arrivals.num_tokens += len(found.token_ids)
        return found

    with monkeypatch.context() as patches:
        patches.setattr(sglang_engine, "_piece", piece)
        yield arrivals


class Prompts:
    """As many correct samples as `answer` says, drawn by lot."""

    def __init__(self, seed: int):
        self.chance, self.num = random.Random(seed), 0

    def next(self) -> Prompt:
        self.num += 1
        return Prompt(self.num - 1, PROMPT, "", str(self.chance.choice([0, 1, 1, 1, 2])))


class Scorer:
    """The first ones are correct."""

    async def score(self, responses: Sequence[str], answer: str) -> tuple[Score, ...]:
        await asyncio.sleep(0)
        return tuple(Score(float(index < int(answer)), index < int(answer)) for index in range(len(responses)))


def rules(**changes) -> SamplerRules:
    params = SamplingParams(max_response_tokens=8)
    return SamplerRules(num_samples_per_prompt=2, params=params, seed=0, max_over_sampling=50.0, **changes)


def held_over(stats: SamplerStats) -> int:
    return sum(getattr(stats, f"num_tokens_{name}") for name in HELD_OVER)


async def lose(servers: Sequence[FakeServer], arrivals: Arrivals, work: asyncio.Future) -> None:
    """In the middle of the samples, unless nothing is asked of the servers."""
    arrived = arrivals.num_tokens
    for server in servers:
        server.pauses_after = 3
    while arrivals.num_tokens == arrived and not work.done() and all(server.may_generate.is_set() for server in servers):
        await asyncio.sleep(0.001)
    await asyncio.gather(*(server.die() for server in servers))


@pytest.mark.parametrize("kind", [WaveSampler, StreamingSampler])
async def test_tokens_of_samples_that_begin_again_under_newer_weights_are_counted(
    kind: type[Sampler], monkeypatch: pytest.MonkeyPatch
):
    with counted(monkeypatch) as arrivals:
        async with fleet(1, restart_deadline_seconds=60) as (router, state):
            await update(router, state, 1)
            state.held = 2
            collecting = asyncio.ensure_future(kind([router], Scorer(), Prompts(0), rules()).collect(4))
            await lose([state.servers["engine 0"]], arrivals, collecting)
            batch = await collecting
    stats = batch.stats
    assert all(group.oldest_weight_version == 2 for group in batch.groups)
    assert stats.num_tokens_redrawn > 0
    assert stats.num_tokens_generated == arrivals.num_tokens == sum(getattr(stats, f"num_tokens_{name}") for name in ENDS)


def not_told_yet(router: Router) -> int:
    """Tokens of held requests that came after they were given out."""
    given = sum(len(sample.token_ids) for flight in router._held.values() for sample in flight.given)
    return sum(flight.num_tokens for flight in router._held.values()) - given


@pytest.mark.parametrize("unfinished", ["aborted", "computed again", "retract", "in_place"])
async def test_law_holds_over_losses_updates_aborts_and_evaluations(unfinished: str, monkeypatch: pytest.MonkeyPatch):
    seen = dict.fromkeys(ENDS, 0)
    partial, pauses = unfinished != "aborted", unfinished in ("retract", "in_place")
    settings = {"restart_deadline_seconds": 60, "pause_mode": unfinished if pauses else "retract"}
    num_told = 0
    protocol = Protocol(2, SamplingParams(max_response_tokens=8), seed=1)
    changes = {"in_flight_margin": 1.0, "partial_rollout": partial, "accuracy_max": 0.5, "max_staleness": 2}
    with counted(monkeypatch) as arrivals:
        async with fleet(mixes_versions=partial, may_pause=pauses, **settings) as (router, state):
            sampler = StreamingSampler([router], Scorer(), Prompts(1), rules(**changes))
            before = 0
            for step in range(9):
                await update(router, state, router.weight_version + 1 + step % 2)
                first, second = state.servers.values()
                second.seconds_per_token = 0.02  # the first one fills the step
                first.tokens_per_piece = second.tokens_per_piece = 3 if pauses else 1
                collecting = asyncio.ensure_future(sampler.collect(4))
                if step % 3 == 0:  # the actor has trained on
                    state.held = router.weight_version + 1
                    await lose([first, second], arrivals, collecting)
                elif step % 3 == 1:
                    await lose([first], arrivals, collecting)
                stats = (await collecting).stats
                num_told += stats.num_tokens_generated
                assert num_told + not_told_yet(router) == arrivals.num_tokens
                assert stats.num_tokens_generated + before == sum(getattr(stats, f"num_tokens_{name}") for name in ENDS)
                before = held_over(stats)
                for name in ENDS:
                    seen[name] += getattr(stats, f"num_tokens_{name}")

                state.held = None
                for server in state.servers.values():
                    server.seconds_per_token = 0.0
                await update(router, state, router.weight_version + 1)
                measured = await held_out_metrics([router], Scorer(), [Prompt(0, PROMPT, "", "1")] * 2, protocol)
                num_told += 2 * 2 * 8
                assert num_told + not_told_yet(router) == arrivals.num_tokens
                assert measured["eval/num_tokens_generated"] == 2 * 2 * 8
                assert measured["eval/num_tokens_redrawn"] == 0
    assert all(seen[name] for name in ("used", "zero_variance", *(("unfinished",) if partial else ("aborted", "redrawn")))), seen


async def test_tokens_of_an_evaluation_that_are_drawn_again_are_its_own(monkeypatch: pytest.MonkeyPatch):
    protocol = Protocol(2, SamplingParams(max_response_tokens=8), seed=1)
    with counted(monkeypatch) as arrivals:
        async with fleet(1, restart_deadline_seconds=60) as (router, state):
            measuring = asyncio.ensure_future(held_out_metrics([router], Scorer(), [Prompt(0, PROMPT, "", "1")], protocol))
            await lose([state.servers["engine 0"]], arrivals, measuring)
            measured = await measuring
            of_evaluation = arrivals.num_tokens
            stats = (await WaveSampler([router], Scorer(), Prompts(0), rules()).collect(2)).stats
    assert measured["eval/num_tokens_generated"] == of_evaluation == 2 * 8, "they went on after the tokens that had come"
    assert stats.num_tokens_generated == arrivals.num_tokens - of_evaluation and stats.num_tokens_redrawn == 0


def test_last_token_that_is_drawn_again_for_its_experts_is_counted():
    partial = PartialSample(PROMPT, Sample(tokens(8), [-0.5] * 8, [0] * 8, "abort", ""), EXPERTS)
    partial.finish_if_complete(SamplingParams(max_response_tokens=8))
    assert (partial.take_redrawn(), len(partial.token_ids)) == (1, 7)


async def test_request_tells_how_many_of_its_tokens_are_in_no_sample(monkeypatch: pytest.MonkeyPatch):
    with counted(monkeypatch) as arrivals:
        async with fleet(1, restart_deadline_seconds=60) as (router, state):
            await update(router, state, 1)
            state.held = 2

            async def complete() -> list:
                return [result async for result in router.generate([request(0)])]

            work = asyncio.ensure_future(complete())
            await lose([state.servers["engine 0"]], arrivals, work)
            (result,) = await work
    assert result.num_tokens_redrawn == arrivals.num_tokens - 2 * 8 > 0
