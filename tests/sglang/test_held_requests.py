"""Requests that real servers hold over an update of the weights, and what their log-probs are then."""

from __future__ import annotations

import asyncio
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from dapo_megatron.rollout.engine import GenerateRequest, GenerateResult, SamplingParams
from dapo_megatron.rollout.router import Router
from dapo_megatron.types import EngineEndpoint, Sample
from tests.sglang.conftest import MAX_DIFFERENCE, Pair, log_probs_of, needs_sglang, other_weights, reference_of, routed
from tests.sglang.test_streaming import push

pytestmark = [pytest.mark.sglang, needs_sglang, pytest.mark.timeout(300)]

NUM_TOKENS = 400
PROMPTS = [(5, 17, 33, 2, 9), (90, 4, 61)]


async def complete(router: Router, request: GenerateRequest) -> GenerateResult:
    (result,) = [result async for result in router.generate([request])]
    return result


def num_prefilled(endpoints: list[EngineEndpoint]) -> int:
    """Tokens that the servers say they have prefilled so far."""
    logs = [endpoint.log_file.read_text(errors="replace") for endpoint in endpoints if endpoint.log_file is not None]
    counts = [int(number) for log in logs for number in re.findall(r"Prefill batch.*?#new-token: (\d+)", log)]
    return sum(count for count in counts if count > 1)  # a look at the health of an idle server is one token


@torch.no_grad()
def over_the_old_cache(old: Any, new: Any, prompt: tuple[int, ...], sample: Sample, num_old: int) -> torch.Tensor:
    """[T]: log-probs of the tokens, of the new weights from token `num_old` on, over the cache that the old ones left."""
    tokens = torch.tensor([[*prompt, *sample.token_ids.tolist()]])
    num_computed = len(prompt) + num_old - 1  # the last token of the old weights goes through the new ones
    cache = transformers.DynamicCache()
    first = old(tokens[:, :num_computed], past_key_values=cache, use_cache=True).logits
    rest = new(tokens[:, num_computed:], past_key_values=cache, use_cache=True).logits
    log_probs = torch.cat([first, rest], dim=1)[0, len(prompt) - 1 : -1].log_softmax(-1)
    return log_probs.gather(1, tokens[0, len(prompt) :, None])[:, 0]


@torch.no_grad()
def computed_again(old: Any, new: Any, prompt: tuple[int, ...], sample: Sample, num_old: int) -> torch.Tensor:
    """[T]: log-probs of the tokens, each of the weights it names alone."""
    rows = torch.cat([log_probs_of(old, prompt, sample)[:num_old], log_probs_of(new, prompt, sample)[num_old:]])
    return rows.gather(1, torch.tensor(sample.token_ids.tolist())[:, None])[:, 0]


@pytest.mark.parametrize("mode", ["retract", "in_place"])
async def test_samples_go_on_over_an_update_with_the_log_probs_of_what_drew_them(pair: Pair, mode: str, tmp_path: Path):
    params = SamplingParams(max_response_tokens=NUM_TOKENS)
    requests = [GenerateRequest(index, prompt, 4, 0, params) for index, prompt in enumerate(PROMPTS)]
    async with routed(pair, pause_mode=mode) as router:
        version = router.weight_version
        model = other_weights(pair.model, tmp_path / "model", seed=1)
        work = [asyncio.ensure_future(complete(router, request)) for request in requests]
        while len(router._flights) < 2 or any(flight.num_tokens < 4 * 5 for flight in router._flights.values()):
            assert not any(item.done() for item in work), "a request was complete before it could be held"
            await asyncio.sleep(0.001)
        await router.hold({0, 1})
        first = await asyncio.gather(*work)
        assert not all(result.is_complete for result in first)
        num_before = num_prefilled(pair.endpoints)
        await router.update_weights(version + 1, partial(push, model, version + 1))
        again = [
            GenerateRequest(index, prompt, 4, 0, params, started=result.samples)
            for index, (prompt, result) in enumerate(zip(PROMPTS, first, strict=True))
            if not result.is_complete
        ]
        results = await asyncio.gather(*(complete(router, request) for request in again))
        num_again = num_prefilled(pair.endpoints) - num_before
        fresh = await complete(router, GenerateRequest(7, PROMPTS[0], 1, 0, params))
        assert router.num_engines_lost == 0
    old, new = reference_of(pair.model), reference_of(model)
    expected = computed_again if mode == "retract" else over_the_old_cache
    num_kept = num_mixed = 0
    for result in results:
        prompt = PROMPTS[result.request_id]
        for sample in result.samples:
            num_old, num_tokens = sample.weight_versions.tolist().count(version), len(sample.token_ids)
            assert sample.weight_versions.tolist() == [version] * num_old + [version + 1] * (num_tokens - num_old)
            stopped = sample.token_ids[-1] == new.config.eos_token_id  # at the last token that may come, too
            assert num_old and sample.finish_reason == ("stop" if stopped else "length") and (stopped or num_tokens == NUM_TOKENS)
            if num_old < num_tokens:  # else it was complete before
                num_mixed, num_kept = num_mixed + 1, num_kept + num_old
            # In place, SGLang names the newer version for a token that was in the works when the pause came.
            splits = [num_old, min(num_old + 1, num_tokens)] if mode == "in_place" else [num_old]
            wanted = [expected(old, new, prompt, sample, split) for split in splits]
            assert min((each - torch.tensor(sample.log_probs)).abs().max() for each in wanted) <= MAX_DIFFERENCE
    assert num_mixed
    if mode == "in_place":
        assert num_again == 0, "nothing was prefilled again"
    else:
        assert num_again >= num_kept
    (sample,) = fresh.samples
    difference = computed_again(new, new, PROMPTS[0], sample, 0) - torch.tensor(sample.log_probs)
    assert difference.abs().max() <= MAX_DIFFERENCE, "a prompt that is asked anew has no prefix of the old weights"
