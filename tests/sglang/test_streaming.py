"""The streaming sampler over real servers whose weights change between steps."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import transformers

from dapo_megatron.rollout.engine import SamplingParams
from dapo_megatron.rollout.sampler import SamplerRules
from dapo_megatron.rollout.sglang_engine import SglangEngine
from dapo_megatron.rollout.streaming_sampler import StreamingSampler
from dapo_megatron.types import EngineEndpoint, Prompt, RolloutGroup, Score
from tests.sglang.conftest import MAX_DIFFERENCE, Pair, log_probs_of, needs_sglang, other_weights, reference_of, routed

pytestmark = [pytest.mark.sglang, needs_sglang, pytest.mark.timeout(300)]

NUM_GROUPS, MOST_STEPS = 3, 8


class Scorer:
    """Right or wrong, as good as by chance."""

    async def score(self, responses: Sequence[str], answer: str) -> tuple[Score, ...]:
        right = [len(response) % 2 == 0 for response in responses]
        return tuple(Score(float(is_right), is_right) for is_right in right)


class Prompts:
    """Random ones."""

    def __init__(self) -> None:
        self.random, self.num = random.Random(0), 0

    def next(self) -> Prompt:
        self.num += 1
        return Prompt(self.num - 1, tuple(self.random.choices(range(100), k=5)), "", "")


@dataclass
class Report:
    failures: dict[str, str] = field(default_factory=dict)


async def push(model: Path, version: int, endpoints: Sequence[EngineEndpoint]) -> Report:
    for endpoint in endpoints:
        client = SglangEngine(endpoint)
        await client.post(
            "/update_weights_from_disk",
            {"model_path": str(model), "weight_version": str(version), "flush_cache": False},
            timeout_seconds=60,
        )
        await client.close()
    return Report()


def assert_drawn_from_the_weights_it_names(group: RolloutGroup, references: dict[int, transformers.PreTrainedModel]) -> None:
    for sample in group.samples:
        for version in set(sample.weight_versions.tolist()):
            of_version = torch.tensor(sample.weight_versions) == version
            expected = log_probs_of(references[version], group.prompt.token_ids, sample)
            drawn = expected.gather(1, torch.tensor(sample.token_ids)[:, None].long())[:, 0]
            assert (drawn - torch.tensor(sample.log_probs))[of_version].abs().max() <= MAX_DIFFERENCE


async def test_every_token_is_accounted_for_and_names_its_weights_while_they_change(pair: Pair, tmp_path: Path):
    rules = SamplerRules(
        num_samples_per_prompt=4,
        params=SamplingParams(max_response_tokens=90, stop_token_ids=(7, 19, 31)),
        seed=0,
        in_flight_margin=2.0,
        partial_rollout=True,
        max_staleness=2,
    )
    references: dict[int, transformers.PreTrainedModel] = {}
    num_mixed = held_over = 0
    async with routed(pair) as router:
        sampler = StreamingSampler([router], Scorer(), Prompts(), rules)
        version = router.weight_version
        for _ in range(MOST_STEPS):
            version += 1
            model = other_weights(pair.model, tmp_path / str(version), seed=version)
            references[version] = reference_of(model)

            async def push_this(endpoints: Sequence[EngineEndpoint], model: Path = model, version: int = version) -> Report:
                return await push(model, version, endpoints)

            await router.update_weights(version, push_this)
            batch = await sampler.collect(NUM_GROUPS)
            stats = batch.stats
            assert len(batch.groups) == stats.num_groups_kept == NUM_GROUPS
            dropped = stats.num_tokens_zero_variance + stats.num_tokens_out_of_band + stats.num_tokens_stale
            kept = stats.num_tokens_surplus_kept + stats.num_tokens_unfinished
            dropped += stats.num_tokens_aborted + stats.num_tokens_redrawn
            assert stats.num_tokens_generated + held_over == stats.num_tokens_used + dropped + kept
            held_over = kept
            for group in batch.groups:
                assert group.oldest_weight_version >= version - rules.max_staleness
                assert_drawn_from_the_weights_it_names(group, references)
                num_mixed += sum(len(set(sample.weight_versions.tolist())) > 1 for sample in group.samples)
            if num_mixed:
                break
        assert num_mixed, "no response went on under new weights"
        assert router.num_engines_lost == 0
