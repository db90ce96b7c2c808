"""A real server that hangs, and one that is killed, under requests."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from tests.sglang.conftest import Pair, needs_sglang, routed
from tests.sglang.test_engines import complete, request

pytestmark = [pytest.mark.sglang, needs_sglang, pytest.mark.timeout(300)]


async def test_stopped_engine_is_taken_out_at_its_deadline(pair: Pair, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pair, "config", pair.config.model_copy(update={"health_deadline_seconds": 3.0}))
    group = pair.servers["engine 0"].pid
    async with routed(pair) as router:
        os.killpg(group, signal.SIGSTOP)
        try:
            results = await complete(router, *(request(index, num_samples=2, max_response_tokens=20) for index in range(4)))
        finally:
            os.killpg(group, signal.SIGCONT)
        assert all(sample.finish_reason != "abort" for result in results for sample in result.samples)
        assert router.num_engines_lost == 1
        assert [endpoint.name for endpoint in router.serving] == ["engine 1"]


async def test_killed_engine_loses_no_token(pair: Pair):
    async with routed(pair) as router:
        requests = [request(index, num_samples=4, temperature=0, max_response_tokens=110) for index in range(4)]
        alone = await complete(router, *requests)
        work = asyncio.ensure_future(complete(router, *requests))
        await asyncio.sleep(0.2)
        os.killpg(pair.servers["engine 1"].pid, signal.SIGKILL)
        for item, result in zip(alone, await work, strict=True):
            for expected, sample in zip(item.samples, result.samples, strict=True):
                assert sample.token_ids.tolist() == expected.token_ids.tolist()
                assert len(sample.log_probs) == len(sample.weight_versions) == len(sample.token_ids)
        assert router.num_engines_lost == 1
        assert [endpoint.name for endpoint in router.serving] == ["engine 0"]
