"""The streaming sampler over two real embedded engines, their weights changing between the steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from dapo_megatron.config.schema import HfEngineConfig
from dapo_megatron.data.loader import PromptStream
from dapo_megatron.data.prompts import DataReport, PromptSet
from dapo_megatron.rollout.engine import SamplingParams
from dapo_megatron.rollout.hf_engine import HfEngine
from dapo_megatron.rollout.sampler import SamplerRules
from dapo_megatron.rollout.streaming_sampler import StreamingSampler
from dapo_megatron.types import Prompt, RolloutGroup, Score
from dapo_megatron.weights.sync import BucketPiece, ManifestBuilder, WeightBucket
from tests.tiny_models import make_hf_model

VOCAB_SIZE, G = 101, 4


class Parity:
    """Correct is a response of an even number of tokens."""

    async def score(self, responses: Sequence[str], answer: str) -> tuple[Score, ...]:
        return tuple(Score(float(even), even) for text in responses for even in [len(text.split()) % 2 == 0])


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_hf_model(tmp_path_factory.mktemp("model"), "qwen3", vocab_size=VOCAB_SIZE, num_hidden_layers=1)
    tokenizer = Tokenizer(models.WordLevel({str(token): token for token in range(VOCAB_SIZE)}, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="0").save_pretrained(directory)
    return directory


def weights_of_version(model_dir: Path, version: int) -> torch.nn.Module:
    """A model of its own for each version."""
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    generator = torch.Generator().manual_seed(version)
    for parameter in model.parameters():
        parameter.data += 0.05 * version * torch.randn(parameter.shape, generator=generator)
    return model


async def send(engine: HfEngine, model: torch.nn.Module, version: int) -> None:
    tensors = {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}
    builder = ManifestBuilder({name: tuple(tensor.shape) for name, tensor in tensors.items()}, version)
    for name, tensor in tensors.items():
        payload = tensor.view(-1).view(torch.uint8).numpy()
        bucket = WeightBucket(version, "float32", (BucketPiece(name, 0, len(tensor), 0, payload.size),), payload)
        builder.add(bucket)
        await engine.receive_bucket(bucket)
    await engine.commit_weights(builder.build())


def log_probs_under(model: torch.nn.Module, group: RolloutGroup, index: int) -> torch.Tensor:
    """[T] of the sample's tokens, in one forward."""
    prompt, response = group.prompt.token_ids, group.samples[index].token_ids.tolist()
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]


async def test_every_token_has_the_log_prob_of_the_weights_its_version_names(model_dir: Path):
    prompts = tuple(Prompt(index, (index + 3, index + 5), "", "") for index in range(6))
    stream = PromptStream(PromptSet(prompts, DataReport(6, 0, 0, 0, ()), fingerprint="0"), seed=3, shuffle=True)
    params = SamplingParams(max_response_tokens=80, stop_token_ids=(8, 50, 77))
    rules = SamplerRules(
        num_samples_per_prompt=G, params=params, seed=3, max_staleness=3, partial_rollout=True, in_flight_margin=2.0
    )
    engines = [HfEngine(model_dir, HfEngineConfig(max_batch_size=12), num_threads=1) for _ in range(2)]
    sampler = StreamingSampler(engines, Parity(), stream, rules)
    versions, groups, held = {0: AutoModelForCausalLM.from_pretrained(model_dir)}, [], 0
    for version in range(4):
        batch = await sampler.collect(3)
        groups += batch.groups
        stats = batch.stats
        total = stats.num_tokens_used + stats.num_tokens_zero_variance + stats.num_tokens_stale
        now_held = stats.num_tokens_surplus_kept + stats.num_tokens_unfinished
        assert stats.num_tokens_generated + held == total + now_held and stats.num_tokens_aborted == 0
        held = now_held
        versions[version + 1] = weights_of_version(model_dir, version + 1)
        for engine in engines:
            await send(engine, versions[version + 1], version + 1)
    samples = [(group, index) for group in groups for index in range(G)]
    assert any(len(set(group.samples[index].weight_versions.tolist())) > 1 for group, index in samples), "some span versions"
    for group, index in samples:
        sample = group.samples[index]
        expected = torch.stack([log_probs_under(versions[version], group, index) for version in versions])
        rows = torch.tensor(sample.weight_versions).long()
        torch.testing.assert_close(torch.tensor(sample.log_probs), expected[rows, torch.arange(len(rows))], atol=1e-5, rtol=0)
