"""Prompts in, scored groups out, over several engines. Training and evaluation both go through here."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Protocol

from dapo_megatron.rollout.engine import GenerateRequest, GenerateResult, Generator, SamplingParams
from dapo_megatron.types import EngineError, Prompt, RolloutGroup, Score


class Scorer(Protocol):
    """Verdicts on the responses to one prompt, in their order."""

    async def score(self, responses: Sequence[str], answer: str) -> tuple[Score, ...]:
        """One Score per response; `answer` is the ground truth."""


async def generate_groups(
    engines: Sequence[Generator],
    scorer: Scorer,
    prompts: Mapping[int, Prompt],
    num_samples_per_prompt: int,
    params: SamplingParams,
    seed: int,
) -> tuple[list[RolloutGroup], int]:
    """One group per entry of `prompts` (group id -> prompt), in its order, and how many tokens were redrawn. Errors as of `for_each_group`."""
    groups: dict[int, RolloutGroup] = {}

    def keep(group: RolloutGroup) -> None:
        groups[group.group_id] = group

    num_tokens_redrawn = await for_each_group(engines, scorer, prompts, num_samples_per_prompt, params, seed, keep)
    return [groups[group_id] for group_id in prompts], num_tokens_redrawn


async def for_each_group(
    engines: Sequence[Generator],
    scorer: Scorer,
    prompts: Mapping[int, Prompt],
    num_samples_per_prompt: int,
    params: SamplingParams,
    seed: int,
    take: Callable[[RolloutGroup], None],
) -> int:
    """Calls `take` with one group per entry of `prompts`, each as soon as it is scored; others still generate meanwhile.

    Returns how many tokens were drawn besides and are in no group (`GenerateResult.num_tokens_redrawn`).
    Group i goes to engine i modulo the number of engines. The first error of an engine, of the scorer or of `take` cancels the rest and
    is raised as it is; EngineError when an engine leaves a request out.
    """
    missing = dict.fromkeys(prompts)
    num_tokens_redrawn = 0

    async def score(result: GenerateResult) -> None:
        prompt = prompts[result.request_id]
        scores = await scorer.score([sample.text for sample in result.samples], prompt.answer)
        take(RolloutGroup(result.request_id, prompt, result.samples, scores))
        del missing[result.request_id]

    async def run(engine: Generator, requests: Sequence[GenerateRequest]) -> None:
        nonlocal num_tokens_redrawn
        async with aclosing(engine.generate(requests)) as results:
            async for result in results:
                num_tokens_redrawn += result.num_tokens_redrawn
                tasks.create_task(score(result))

    shares: list[list[GenerateRequest]] = [[] for _ in engines]
    for group_id, prompt in prompts.items():
        request = GenerateRequest(group_id, prompt.token_ids, num_samples_per_prompt, request_seed(seed, group_id), params)
        shares[group_id % len(engines)].append(request)
    try:
        async with asyncio.TaskGroup() as tasks:
            for engine, requests in zip(engines, shares, strict=True):
                if requests:
                    tasks.create_task(run(engine, requests))
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    if missing:
        raise EngineError(
            f"The engines left out {len(missing)} of {len(prompts)} requests, first {next(iter(missing))}; look at their logs."
        )
    return num_tokens_redrawn


def request_seed(seed: int, group_id: int) -> int:
    """A 63-bit seed that depends on both numbers and is the same on every machine."""
    digest = hashlib.blake2b(f"{seed}:{group_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
