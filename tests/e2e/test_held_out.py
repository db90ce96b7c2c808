"""Evaluation between rollout steps, with the real sampler and the real embedded engine."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from dapo_megatron.config.schema import HfEngineConfig
from dapo_megatron.data.loader import PromptStream
from dapo_megatron.data.prompts import DataReport, PromptSet
from dapo_megatron.eval.measure import Protocol, held_out_metrics
from dapo_megatron.rollout.engine import SamplingParams
from dapo_megatron.rollout.hf_engine import HfEngine
from dapo_megatron.rollout.sampler import RolloutBatch, SamplerRules
from dapo_megatron.rollout.wave_sampler import WaveSampler
from dapo_megatron.types import Prompt, Score
from tests.tiny_models import make_hf_model

PROMPTS = tuple(Prompt(index, (index + 3, index + 5), f"problem {index}", "7") for index in range(6))
PROTOCOL = Protocol(4, SamplingParams(temperature=1.0, top_p=0.7, max_response_tokens=5), seed=1)


class Parity:
    """Correct is a response of an even number of characters; its answer is its last one."""

    async def score(self, responses: Sequence[str], answer: str) -> tuple[Score, ...]:
        return tuple(Score(float(even), even, answer=text[-1:] or None) for text in responses for even in [len(text) % 2 == 0])


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> HfEngine:
    directory = make_hf_model(tmp_path_factory.mktemp("model"), "llama", num_hidden_layers=1)
    tokenizer = Tokenizer(models.WordLevel({str(token): token for token in range(101)}, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="0").save_pretrained(directory)
    return HfEngine(directory, HfEngineConfig(), num_threads=1)


async def collect(engine: HfEngine, *, evaluate: bool) -> list[RolloutBatch]:
    """Three rollout steps, with or without an evaluation after each."""
    stream = PromptStream(PromptSet(PROMPTS, DataReport(6, 0, 0, 0, ()), fingerprint="0"), seed=3, shuffle=True)
    rules = SamplerRules(num_samples_per_prompt=4, params=SamplingParams(max_response_tokens=5), seed=3)
    sampler = WaveSampler([engine], Parity(), stream, rules)
    batches = []
    for _ in range(3):
        batches.append(await sampler.collect(2))
        if evaluate:
            await held_out_metrics([engine], Parity(), PROMPTS, PROTOCOL)
    return batches


async def test_evaluation_leaves_every_token_of_training_as_it_was(engine: HfEngine):
    without, between = [await collect(engine, evaluate=evaluate) for evaluate in (False, True)]
    assert [batch.stats for batch in between] == [batch.stats for batch in without]
    for one, other in zip(between, without, strict=True):
        assert [group.group_id for group in one.groups] == [group.group_id for group in other.groups]
        for mine, theirs in zip(one.groups, other.groups, strict=True):
            assert [list(sample.token_ids) for sample in mine.samples] == [list(sample.token_ids) for sample in theirs.samples]
            assert [list(sample.log_probs) for sample in mine.samples] == [list(sample.log_probs) for sample in theirs.samples]


async def test_every_evaluation_of_the_same_weights_gives_the_same_numbers(engine: HfEngine):
    first, second = [await held_out_metrics([engine], Parity(), PROMPTS, PROTOCOL) for _ in range(2)]
    assert first == second
    assert 0 < first["eval/accuracy"] < 1 and first["eval/accuracy"] <= first["eval/solved_fraction"]
    assert set(first) == {
        "eval/accuracy",
        "eval/accuracy_standard_error",
        "eval/solved_fraction",
        "eval/majority_accuracy",
        "eval/response_length_tokens",
        "eval/truncated_fraction",
        "eval/num_tokens_generated",
        "eval/num_tokens_redrawn",
    }
