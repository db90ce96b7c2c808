"""Two SGLang servers through our router, beside the same requests sent straight to them by a plain aiohttp client.

    python -m benchmarks.rollout

The servers are real, on this machine, the weights random. The two ways take turns on the same prompts, and each goes first every other
round. The plain client knows beforehand which half of the prompts each server gets and waits for whole answers; the router spreads them,
streams, watches the servers, checks weight versions and decodes the texts.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import aiohttp

from benchmarks.weight_sync import COMMON, SHAPES
from dapo_megatron.config.schema import SglangEngineConfig
from dapo_megatron.rollout.engine import GenerateRequest, SamplingParams
from dapo_megatron.rollout.router import Router
from dapo_megatron.rollout.sglang_engine import SglangEngine
from dapo_megatron.rollout.sglang_server import ServerSpec, SglangServer
from dapo_megatron.types import EngineEndpoint, EngineError

NUM_SERVERS = 2


@dataclass(frozen=True, slots=True)
class Work:
    """What is asked for in one round."""

    prompts: tuple[tuple[int, ...], ...]
    num_samples: int
    num_tokens: int
    """Of each sample."""

    @property
    def num_response_tokens(self) -> int:
        return len(self.prompts) * self.num_samples * self.num_tokens


@dataclass(frozen=True, slots=True)
class Round:
    """What it took."""

    tokens_per_second: float
    cpu_seconds: float
    """Of the client's process."""


def main() -> None:
    """Print a row for each way, and how they compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    config = SglangEngineConfig(dtype="bf16", max_total_tokens=16384)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(COMMON | SHAPES[arguments.shape] | {"eos_token_id": None}))
        servers = [
            SglangServer(
                ServerSpec(
                    name=f"engine {index}",
                    model_dir=folder,
                    config=config,
                    extra={"load_format": "dummy"},
                    device="cpu",
                    random_seed=index,
                ),
                folder / f"server_{index}.log",
            )
            for index in range(NUM_SERVERS)
        ]
        try:
            with ThreadPoolExecutor(NUM_SERVERS) as pool:
                endpoints = list(pool.map(lambda server: server.start(600), servers))
            rounds = [
                Work(_prompts(seed, arguments.prompts, arguments.prompt_tokens), arguments.samples, arguments.tokens)
                for seed in range(arguments.rounds)
            ]
            straight, routed = asyncio.run(_measure(endpoints, config, rounds))
        finally:
            for server in servers:
                server.stop()
    print(
        f"{os.cpu_count()} cores, torch {version('torch')}, sglang {version('sglang')}; {arguments.shape}, bf16, {NUM_SERVERS} servers, "
        f"{arguments.rounds} rounds of {arguments.prompts} prompts x {arguments.samples} samples x {arguments.tokens} tokens"
    )
    for way, of_way in (("straight", straight), ("router", routed)):
        rates = sorted(item.tokens_per_second for item in of_way)
        cpu = statistics.median(item.cpu_seconds for item in of_way) / rounds[0].num_response_tokens
        print(
            f"{way:9} {statistics.median(rates):.1f} tokens/s (min {rates[0]:.1f}, max {rates[-1]:.1f}); "
            f"the client takes {cpu * 1e6:.0f} us of CPU a token"
        )
    ratios = [b.tokens_per_second / a.tokens_per_second for a, b in zip(straight, routed, strict=True)]
    print(
        f"overhead of the router {1 - statistics.median(ratios):+.1%} (median over rounds; min {1 - max(ratios):+.1%}, max {1 - min(ratios):+.1%})"
    )


def _prompts(seed: int, num_prompts: int, num_tokens: int) -> tuple[tuple[int, ...], ...]:
    draw = random.Random(seed)
    return tuple(tuple(draw.choices(range(1000), k=num_tokens)) for _ in range(num_prompts))


async def _measure(
    endpoints: Sequence[EngineEndpoint], config: SglangEngineConfig, rounds: Sequence[Work]
) -> tuple[list[Round], list[Round]]:
    async def no_restart(name: str) -> EngineEndpoint:
        raise EngineError(f"{name} was lost; the figures would mean nothing")

    clients = [SglangEngine(endpoint) for endpoint in endpoints]
    router = Router(endpoints, config, lambda rows: [" ".join(map(str, row)) for row in rows], restart=no_restart)
    sessions = [
        aiohttp.ClientSession(endpoint.url, headers={"Authorization": f"Bearer {endpoint.api_key}"}) for endpoint in endpoints
    ]
    straight: list[Round] = []
    routed: list[Round] = []

    async def go_straight(work: Work) -> int:
        return await _straight(sessions, work)

    async def go_through_router(work: Work) -> int:
        return await _routed(router, work)

    ways: list[tuple[list[Round], Callable[[Work], Awaitable[int]]]] = [(straight, go_straight), (routed, go_through_router)]
    try:
        for _, way in ways:  # what is made on first use
            await way(rounds[0])
        for number, work in enumerate(rounds):
            for results, way in ways if number % 2 else ways[::-1]:
                for client in clients:
                    await client.flush_cache(60)
                start, cpu = time.perf_counter(), time.process_time()
                num_tokens = await way(work)
                assert num_tokens == work.num_response_tokens, f"{num_tokens} of {work.num_response_tokens} tokens came"
                results.append(Round(num_tokens / (time.perf_counter() - start), time.process_time() - cpu))
    finally:
        await asyncio.gather(router.close(), *(item.close() for item in (*clients, *sessions)))
    return straight, routed


async def _straight(sessions: Sequence[aiohttp.ClientSession], work: Work) -> int:
    async def group(index: int, prompt: tuple[int, ...]) -> int:
        body = {
            "input_ids": [list(prompt)] * work.num_samples,
            "sampling_params": {"temperature": 1.0, "max_new_tokens": work.num_tokens, "ignore_eos": True},
            "return_logprob": True,
        }
        async with sessions[index % len(sessions)].post(
            "/generate", json=body, timeout=aiohttp.ClientTimeout(total=None)
        ) as answer:
            answer.raise_for_status()
            return sum(len(sample["meta_info"]["output_token_logprobs"]) for sample in await answer.json())

    return sum(await asyncio.gather(*(group(index, prompt) for index, prompt in enumerate(work.prompts))))


async def _routed(router: Router, work: Work) -> int:
    params = SamplingParams(max_response_tokens=work.num_tokens)
    requests = [GenerateRequest(index, prompt, work.num_samples, 0, params) for index, prompt in enumerate(work.prompts)]
    return sum([len(sample.log_probs) async for result in router.generate(requests) for sample in result.samples])


if __name__ == "__main__":
    main()
