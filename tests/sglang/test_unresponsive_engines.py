"""A real server that hangs, and one that is killed, under requests."""

from __future__ import annotations

import os
import signal
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from dapo_megatron.rollout.sglang_engine import Piece, SglangEngine
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


async def test_killed_engine_loses_no_token(pair: Pair, monkeypatch: pytest.MonkeyPatch):
    requests = [request(index, num_samples=4, temperature=0, max_response_tokens=400) for index in range(4)]
    async with routed(pair) as router:
        alone = await complete(router, *requests)
        monkeypatch.setattr(SglangEngine, "stream", killed_at_its_first_token(pair, "engine 1"))
        for item, result in zip(alone, await complete(router, *requests), strict=True):
            for expected, sample in zip(item.samples, result.samples, strict=True):
                assert sample.token_ids.tolist() == expected.token_ids.tolist()
                assert len(sample.log_probs) == len(sample.weight_versions) == len(sample.token_ids)
        assert router.num_engines_lost == 1
        assert [endpoint.name for endpoint in router.serving] == ["engine 0"]


def killed_at_its_first_token(pair: Pair, name: str) -> Callable[..., Awaitable[None]]:
    """`SglangEngine.stream` of a server that is killed when a token of it arrives."""
    stream, victims = SglangEngine.stream, [pair.servers[name].pid]

    async def killed(engine: SglangEngine, continuations: Any, params: Any, take: Callable[..., None], *rest: Any) -> None:
        def take_and_kill(index: int, piece: Piece) -> None:
            if engine.endpoint.name == name and victims:
                os.killpg(victims.pop(), signal.SIGKILL)
            take(index, piece)

        await stream(engine, continuations, params, take_and_kill, *rest)

    return killed
