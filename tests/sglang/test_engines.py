"""Real servers behind the router: what they generate."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from dapo_megatron.config.schema import SglangEngineConfig
from dapo_megatron.rollout.engine import GenerateRequest, GenerateResult, SamplingParams
from dapo_megatron.rollout.room import room
from dapo_megatron.rollout.router import Router
from dapo_megatron.rollout.sglang_engine import SglangEngine
from dapo_megatron.rollout.sglang_server import ServerSpec, SglangServer
from dapo_megatron.types import EngineError
from tests.sglang.conftest import MAX_DIFFERENCE, Pair, log_probs_of, needs_sglang, reference_of, routed

pytestmark = [pytest.mark.sglang, needs_sglang, pytest.mark.timeout(300)]

COLUMNS = ("token_ids", "log_probs", "weight_versions")
PROMPTS = [(5, 17, 33, 2), (90, 4), (8, 8, 61, 44, 29, 73, 11), (100, 1, 50), (3,)]


def request(index: int, num_samples: int = 1, **params) -> GenerateRequest:
    return GenerateRequest(index, PROMPTS[index % len(PROMPTS)], num_samples, seed=0, params=SamplingParams(**params))


async def complete(router: Router, *requests: GenerateRequest) -> list[GenerateResult]:
    results = {result.request_id: result async for result in router.generate(requests)}
    return [results[item.request_id] for item in requests]


@pytest.fixture(scope="module")
def reference(starting_pair: Future[Pair]) -> transformers.PreTrainedModel:
    return reference_of(starting_pair.result().model)


def test_server_that_fails_at_start_shows_its_log(starting_pair: Future[Pair], tmp_path: Path):
    """While the pair starts."""
    spec = ServerSpec(
        name="engine 7",
        model_dir=tmp_path,
        config=SglangEngineConfig(dtype="fp32"),
        extra={"attention_backend": "of_my_own"},
        device="cpu",
    )
    with pytest.raises(EngineError, match="engine 7 ended with exit code 2 while it started") as caught:
        SglangServer(spec, tmp_path / "engine.log").start(250)
    assert str(tmp_path / "engine.log") in str(caught.value) and "invalid choice: 'of_my_own'" in str(caught.value)


async def test_greedy_tokens_and_their_log_probs_are_those_of_transformers(pair: Pair, reference):
    async with routed(pair) as router:
        requests = [request(index, temperature=0, max_response_tokens=24) for index in range(len(PROMPTS))]
        for item, result in zip(requests, await complete(router, *requests), strict=True):
            (sample,) = result.samples
            expected = log_probs_of(reference, item.prompt_token_ids, sample, 1.0)
            assert sample.token_ids.tolist() == expected.argmax(dim=-1).tolist()
            difference = (expected.max(dim=-1).values - torch.tensor(sample.log_probs)).abs().max()
            assert difference <= MAX_DIFFERENCE
            assert sample.finish_reason == "length" and len(sample.token_ids) == 24
            assert set(sample.weight_versions.tolist()) == {0}


async def test_response_fills_the_room_that_a_server_has_and_is_not_cut_off_in_silence(pair: Pair):
    """One of 2048 positions, less what SGLang keeps."""
    client = SglangEngine(pair.endpoints[0])
    most = room(await client.get("/server_info", timeout_seconds=30))
    await client.close()
    prompt = tuple(7 + index % 60 for index in range(most - 12))
    async with routed(pair) as router:
        fits, exceeds = (
            GenerateRequest(0, prompt, 1, 0, SamplingParams(temperature=0, max_response_tokens=limit)) for limit in (12, 17)
        )
        (result,) = await complete(router, fits)
        assert len(result.samples[0].token_ids) == 12 and result.samples[0].finish_reason == "length"
        with pytest.raises(
            EngineError, match=r"cut a response to request 0 off after 16 tokens, before its max_response_tokens \(17\)"
        ):
            await complete(router, exceeds)
        begun = replace(
            result.samples[0], finish_reason="abort", **{name: getattr(result.samples[0], name)[:11] for name in COLUMNS}
        )
        (resumed,) = await complete(router, replace(fits, started=(begun,)))
        assert resumed.samples[0].token_ids.tolist() == result.samples[0].token_ids.tolist(), "it may go on before its last token"
        with pytest.raises(EngineError, match="engine . refused to generate: Input length .* exceeds the maximum allowed length"):
            await complete(router, GenerateRequest(0, (*prompt, *range(7, 19)), 1, 0, SamplingParams(max_response_tokens=1)))


async def test_samples_of_a_group_differ_and_their_log_probs_count_the_temperature(pair: Pair, reference):
    async with routed(pair) as router:
        item = request(0, num_samples=6, temperature=0.7, max_response_tokens=12)
        (result,) = await complete(router, item)
        assert len({tuple(sample.token_ids.tolist()) for sample in result.samples}) == 6
        for sample in result.samples:
            expected = log_probs_of(reference, item.prompt_token_ids, sample, 0.7)
            drawn = expected.gather(1, torch.tensor(sample.token_ids)[:, None].long())[:, 0]
            assert (drawn - torch.tensor(sample.log_probs)).abs().max() <= MAX_DIFFERENCE


async def test_stop_token_ends_the_sample_and_stays_in_it(pair: Pair):
    async with routed(pair) as router:
        (whole,) = await complete(router, request(0, temperature=0, max_response_tokens=24))
        tokens = whole.samples[0].token_ids.tolist()
        stop = tokens[9]
        (result,) = await complete(router, request(0, temperature=0, max_response_tokens=24, stop_token_ids=(stop,)))
        assert result.samples[0].token_ids.tolist() == tokens[: tokens.index(stop) + 1]
        assert result.samples[0].finish_reason == "stop"


async def test_top_k_and_top_p_bound_what_is_drawn(pair: Pair, reference):
    async with routed(pair) as router:
        requests = [
            request(0, num_samples=4, top_k=3, max_response_tokens=16),
            request(1, num_samples=4, top_p=0.05, max_response_tokens=16),
        ]
        for item, result, bound in zip(requests, await complete(router, *requests), (3, None), strict=True):
            for sample in result.samples:
                expected = log_probs_of(reference, item.prompt_token_ids, sample, 1.0)
                drawn = expected.gather(1, torch.tensor(sample.token_ids)[:, None].long())
                more_likely = (expected > drawn + MAX_DIFFERENCE).sum(dim=-1)
                mass = torch.where(expected > drawn + MAX_DIFFERENCE, expected.exp(), 0.0).sum(dim=-1)
                assert bool((more_likely < bound).all()) if bound else bool((mass < 0.05 + 1e-4).all())


async def test_aborted_samples_keep_their_tokens_and_go_on_as_if_nothing_had_been(pair: Pair):
    async with routed(pair) as router:
        limit = 100
        (whole,) = await complete(router, request(0, temperature=0, max_response_tokens=limit))
        work = asyncio.ensure_future(complete(router, request(0, temperature=0, max_response_tokens=limit)))
        await asyncio.sleep(0.15)
        await router.abort([0])
        (aborted,) = await work
        partial = aborted.samples[0]
        assert partial.token_ids.tolist() == whole.samples[0].token_ids.tolist()[: len(partial.token_ids)]
        assert len(partial.log_probs) == len(partial.token_ids)
        if aborted.is_complete:  # a fast machine
            return
        item = GenerateRequest(0, PROMPTS[0], 1, 0, SamplingParams(temperature=0, max_response_tokens=limit), aborted.samples)
        (resumed,) = await complete(router, item)
        assert resumed.samples[0].token_ids.tolist() == whole.samples[0].token_ids.tolist()


async def test_memory_is_released_and_taken_back(pair: Pair):
    async with routed(pair) as router:
        before = await complete(router, request(2, temperature=0, max_response_tokens=8))
        for endpoint in pair.endpoints:
            client = SglangEngine(endpoint)
            await client.flush_cache(30)
            await client.release_memory(["kv_cache", "weights"], 30)
            await client.resume_memory(["weights"], 30)
            await client.resume_memory(["kv_cache"], 30)
            await client.close()
        after = await complete(router, request(2, temperature=0, max_response_tokens=8))
        assert after[0].samples[0].token_ids.tolist() == before[0].samples[0].token_ids.tolist()
