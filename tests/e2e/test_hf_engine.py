"""The embedded engine against plain transformers, on tiny random models of each family."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from dapo_megatron.config.schema import HfEngineConfig
from dapo_megatron.rollout import decoding
from dapo_megatron.rollout.engine import GenerateRequest, SamplingParams
from dapo_megatron.rollout.hf_engine import HfEngine
from dapo_megatron.types import EngineError, FingerprintError, Sample
from dapo_megatron.weights.sync import BucketPiece, ManifestBuilder, WeightBucket, WeightManifest
from tests.tiny_models import FAMILIES, make_hf_model

VOCAB_SIZE = 101
PROMPTS = [(3, 14, 15, 92, 65), (35, 89), (79, 32, 38, 46, 26, 43, 38, 32), (7,), (50, 28, 84, 19, 71, 69)]
GREEDY = SamplingParams(temperature=0, max_response_tokens=9)


@pytest.fixture(scope="module")
def model_dirs(tmp_path_factory) -> dict[str, Path]:
    """One random model per family, each with a tokenizer that writes token i as "i"; token 0 is special."""
    tokenizer = Tokenizer(models.WordLevel({str(token): token for token in range(VOCAB_SIZE)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    root = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        make_hf_model(root / family, family, vocab_size=VOCAB_SIZE, max_position_embeddings=256)
        transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="0").save_pretrained(root / family)
    return {family: root / family for family in FAMILIES}


def make_engine(model_dir: Path, **config) -> HfEngine:
    return HfEngine(model_dir, HfEngineConfig(**config), num_threads=1)


def make_requests(params: SamplingParams, num_samples: int = 3) -> list[GenerateRequest]:
    return [GenerateRequest(10 + index, prompt, num_samples, 1000 + index, params) for index, prompt in enumerate(PROMPTS)]


async def generate(engine: HfEngine, requests: list[GenerateRequest]) -> dict[int, tuple[Sample, ...]]:
    return {result.request_id: result.samples async for result in engine.generate(requests)}


def staggered(requests: list[GenerateRequest]) -> list[GenerateRequest]:
    """The same requests with response limits 2, 5, 8, ... so that rows leave at different steps."""
    limits = [SamplingParams(r.params.temperature, max_response_tokens=2 + 3 * i) for i, r in enumerate(requests)]
    return [GenerateRequest(r.request_id, r.prompt_token_ids, r.num_samples, r.seed, limits[i]) for i, r in enumerate(requests)]


def reference_log_probs(model, prompt: tuple[int, ...], response: np.ndarray, temperature: float) -> torch.Tensor:
    """[T, V] of one forward over prompt and response, no cache."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *response.tolist()]])).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1)


def assert_same_samples(actual: dict[int, tuple[Sample, ...]], expected: dict[int, tuple[Sample, ...]]) -> None:
    """Equal up to rounding of the log-probs."""
    assert actual.keys() == expected.keys()
    for request_id, samples in expected.items():
        for one, other in zip(actual[request_id], samples, strict=True):
            assert one.token_ids.tolist() == other.token_ids.tolist()
            torch.testing.assert_close(torch.tensor(one.log_probs), torch.tensor(other.log_probs), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
async def test_greedy_equals_generate_of_transformers(family, model_dirs):
    requests = staggered(make_requests(GREEDY, num_samples=2))
    results = await generate(make_engine(model_dirs[family], max_batch_size=5), requests)
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dirs[family])
    for request in requests:
        output = model.generate(
            torch.tensor([request.prompt_token_ids]),
            do_sample=False,
            max_new_tokens=request.params.max_response_tokens,
            eos_token_id=None,
            pad_token_id=0,
        )
        expected = output[0, len(request.prompt_token_ids) :].tolist()
        assert [sample.token_ids.tolist() for sample in results[request.request_id]] == [expected, expected]


@pytest.mark.parametrize("family", FAMILIES)
async def test_log_probs_equal_a_plain_forward(family, model_dirs):
    requests = make_requests(SamplingParams(temperature=0.7, max_response_tokens=12))
    results = await generate(make_engine(model_dirs[family], max_batch_size=7), requests)
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dirs[family], attn_implementation="eager")
    for request in requests:
        for sample in results[request.request_id]:
            reference = reference_log_probs(model, request.prompt_token_ids, sample.token_ids, 0.7)
            expected = reference.gather(1, torch.tensor(sample.token_ids.tolist())[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(sample.log_probs), expected, atol=1e-5, rtol=0)
    assert len({tuple(sample.token_ids) for samples in results.values() for sample in samples}) > 10


async def test_requests_of_one_call_keep_their_own_truncation(model_dirs):
    truncated = SamplingParams(temperature=1.2, top_k=4, top_p=0.8, max_response_tokens=8)
    free = SamplingParams(temperature=0.9, max_response_tokens=5)
    requests = [GenerateRequest(0, PROMPTS[0], 6, 1, truncated), GenerateRequest(1, PROMPTS[1], 6, 2, free)]
    engine = make_engine(model_dirs["llama"])
    results = await generate(engine, requests)
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dirs["llama"])
    for sample in results[0]:
        log_probs = reference_log_probs(model, PROMPTS[0], sample.token_ids, 1.2)
        for step, token in enumerate(sample.token_ids):
            best = log_probs[step].topk(4)
            head = best.values.softmax(-1)
            kept = 1 + int((head.cumsum(-1) < 0.8).sum())
            rank = best.indices[:kept].tolist().index(token)
            expected = (head[:kept] / head[:kept].sum()).log()[rank].item()
            assert sample.log_probs[step] == pytest.approx(expected, abs=1e-5)
    assert_same_samples({1: results[1]}, await generate(engine, requests[1:]))


@pytest.mark.parametrize("max_batch_size", [3, 4, 64])
async def test_company_in_the_batch_does_not_change_a_sample(max_batch_size, model_dirs):
    requests = staggered(make_requests(SamplingParams()))
    together = await generate(make_engine(model_dirs["qwen2"], max_batch_size=max_batch_size), requests)
    alone_engine = make_engine(model_dirs["qwen2"])
    alone: dict[int, tuple[Sample, ...]] = {}
    for request in requests:
        alone |= await generate(alone_engine, [request])
    assert_same_samples(together, alone)


async def test_group_larger_than_the_batch_is_generated_in_pieces(model_dirs):
    requests = make_requests(SamplingParams(max_response_tokens=6), num_samples=7)
    pieces = await generate(make_engine(model_dirs["llama"], max_batch_size=3), requests)
    assert_same_samples(pieces, await generate(make_engine(model_dirs["llama"]), requests))


async def test_cache_grows_with_the_responses(model_dirs, monkeypatch):
    requests = make_requests(SamplingParams(max_response_tokens=70))
    expected = await generate(make_engine(model_dirs["llama"]), requests)
    monkeypatch.setattr(decoding, "_FIRST_CAPACITY", 2)
    assert_same_samples(await generate(make_engine(model_dirs["llama"]), requests), expected)


async def test_same_call_gives_the_same_bits(model_dirs):
    stops = tuple(range(0, VOCAB_SIZE, 9))
    requests = make_requests(SamplingParams(max_response_tokens=20, stop_token_ids=stops), num_samples=8)
    engine = make_engine(model_dirs["qwen3"], max_batch_size=20)
    first = [result async for result in engine.generate(requests)]
    assert [result async for result in engine.generate(requests)] == first
    assert [result async for result in make_engine(model_dirs["qwen3"], max_batch_size=20).generate(requests)] == first


async def test_prompt_of_a_group_is_prefilled_once(model_dirs):
    engine = make_engine(model_dirs["llama"])
    shapes = []
    engine._model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    await generate(engine, make_requests(SamplingParams(max_response_tokens=3), num_samples=6))
    assert shapes == [(5, 8), (30, 1), (30, 1)]


async def test_sample_ends_at_a_stop_token_or_at_its_limit(model_dirs):
    stops = tuple(range(0, VOCAB_SIZE, 9))
    params = SamplingParams(max_response_tokens=10, stop_token_ids=stops)
    samples = [
        s for group in (await generate(make_engine(model_dirs["llama"]), make_requests(params, 8))).values() for s in group
    ]
    assert {sample.finish_reason for sample in samples} == {"stop", "length"}
    for sample in samples:
        assert not set(sample.token_ids[:-1]) & set(stops)
        assert (sample.token_ids[-1] in stops) == (sample.finish_reason == "stop")
        assert len(sample.token_ids) == 10 or sample.finish_reason == "stop"
        assert sample.text == " ".join(str(token) for token in sample.token_ids if token != 0)
        assert len(sample.log_probs) == len(sample.weight_versions) == len(sample.token_ids)


async def test_results_come_as_groups_finish(model_dirs):
    requests = staggered(make_requests(SamplingParams()))[::-1]
    order = [result.request_id async for result in make_engine(model_dirs["llama"]).generate(requests)]
    assert order == [10, 11, 12, 13, 14]


async def test_a_caller_that_is_slow_gets_everything(model_dirs):
    """All requests are over before the second result is asked for."""
    engine = make_engine(model_dirs["llama"])
    taken = []
    async for result in engine.generate(staggered(make_requests(GREEDY))):
        taken.append(result.request_id)
        while engine._calls:
            await asyncio.sleep(0.01)
    assert sorted(taken) == [10 + index for index in range(len(PROMPTS))]


def buckets_of(model: transformers.PreTrainedModel, version: int) -> tuple[list[WeightBucket], WeightManifest]:
    """Each tensor of the model as a bucket, as an actor would send it."""
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    builder = ManifestBuilder({name: tuple(tensor.shape) for name, tensor in tensors.items()}, version)
    buckets = []
    for name, tensor in tensors.items():
        payload = tensor.contiguous().view(-1).view(torch.uint8).numpy()
        piece = BucketPiece(name, 0, len(tensor), 0, payload.size)
        buckets.append(WeightBucket(version, str(tensor.dtype).removeprefix("torch."), (piece,), payload))
        builder.add(buckets[-1])
    return buckets, builder.build()


def perturbed_copy(model_dir: Path, directory: Path) -> Path:
    """Another model of the same shape, with its tokenizer."""
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(directory)
    transformers.AutoTokenizer.from_pretrained(model_dir).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("family", FAMILIES)
async def test_committed_weights_answer_like_the_model_that_was_sent(family, model_dirs, tmp_path):
    other_dir = perturbed_copy(model_dirs[family], tmp_path / "other")
    engine, requests = make_engine(model_dirs[family]), make_requests(SamplingParams(max_response_tokens=6))
    before = await generate(engine, requests)
    buckets, manifest = buckets_of(transformers.AutoModelForCausalLM.from_pretrained(other_dir), version=4)
    for bucket in buckets:
        await engine.receive_bucket(bucket)
    assert engine.weight_version == 0
    await engine.commit_weights(manifest)
    assert engine.weight_version == 4
    after, expected = await generate(engine, requests), await generate(make_engine(other_dir), requests)
    for request in requests:
        for sample, same, old in zip(
            after[request.request_id], expected[request.request_id], before[request.request_id], strict=True
        ):
            assert sample == replace(same, weight_versions=sample.weight_versions)
            assert set(sample.weight_versions) == {4} and set(old.weight_versions) == {0}
    assert after != before


async def test_bf16_engine_takes_fp32_weights(model_dirs, tmp_path):
    other_dir = perturbed_copy(model_dirs["llama"], tmp_path / "other")
    engine, requests = make_engine(model_dirs["llama"], dtype="bf16"), make_requests(SamplingParams(max_response_tokens=6))
    buckets, manifest = buckets_of(transformers.AutoModelForCausalLM.from_pretrained(other_dir), version=1)
    for bucket in buckets:
        await engine.receive_bucket(bucket)
    await engine.commit_weights(manifest)
    after, expected = await generate(engine, requests), await generate(make_engine(other_dir, dtype="bf16"), requests)
    for request in requests:
        for sample, same in zip(after[request.request_id], expected[request.request_id], strict=True):
            assert sample == replace(same, weight_versions=sample.weight_versions)


async def test_half_received_weights_cannot_generate_until_a_right_update_is_whole(model_dirs):
    engine, requests = make_engine(model_dirs["llama"]), make_requests(GREEDY)
    buckets, manifest = buckets_of(transformers.AutoModelForCausalLM.from_pretrained(model_dirs["llama"]), version=2)
    await engine.receive_bucket(buckets[0])
    with pytest.raises(EngineError, match="part of weight version 2"):
        await generate(engine, requests)
    with pytest.raises(FingerprintError, match="incomplete"):
        await engine.commit_weights(manifest)
    with pytest.raises(EngineError, match="part of weight version 2"):
        await generate(engine, requests)
    for bucket in buckets:
        await engine.receive_bucket(bucket)
    wrong = WeightManifest(2, manifest.fingerprints | {buckets[0].pieces[0].name: "0" * 16})
    with pytest.raises(FingerprintError, match=buckets[0].pieces[0].name):
        await engine.commit_weights(wrong)
    assert engine.weight_version == 0
    for bucket in buckets:
        await engine.receive_bucket(bucket)
    await engine.commit_weights(manifest)
    assert len(await generate(engine, requests)) == len(requests)


async def test_commit_without_buckets_is_refused(model_dirs):
    with pytest.raises(EngineError, match="must follow the buckets"):
        await make_engine(model_dirs["llama"]).commit_weights(WeightManifest(1, {}))


async def test_weights_wait_for_generation_and_an_abandoned_call_makes_room(model_dirs):
    engine, requests = make_engine(model_dirs["llama"]), staggered(make_requests(SamplingParams()))
    buckets, _ = buckets_of(transformers.AutoModelForCausalLM.from_pretrained(model_dirs["llama"]), version=1)
    running = engine.generate(requests)
    await anext(running)
    with pytest.raises(EngineError, match="receive_bucket\\(\\) must wait until generate\\(\\) has ended"):
        await engine.receive_bucket(buckets[0])
    await running.aclose()
    await engine.receive_bucket(buckets[0])


@pytest.mark.parametrize("max_batch_size", [4, 64])
async def test_requests_that_come_while_others_decode_get_what_they_get_alone(max_batch_size, model_dirs):
    requests = staggered(make_requests(SamplingParams(), num_samples=2))
    alone = await generate(make_engine(model_dirs["llama"]), requests)
    engine = make_engine(model_dirs["llama"], max_batch_size=max_batch_size)

    async def later(place: int) -> dict[int, tuple[Sample, ...]]:
        await asyncio.sleep(0.002 * place)
        return await generate(engine, [requests[place]])

    together = await asyncio.gather(*(later(place) for place in range(len(requests))))
    assert [list(results) for results in together] == [[request.request_id] for request in requests]
    assert_same_samples({k: v for results in together for k, v in results.items()}, alone)


async def test_a_request_id_that_is_in_work_already_is_refused(model_dirs):
    engine, requests = make_engine(model_dirs["llama"]), make_requests(SamplingParams(max_response_tokens=100))
    running = engine.generate(requests)
    first = asyncio.ensure_future(anext(running))
    await asyncio.sleep(0)
    with pytest.raises(EngineError, match="request ids must be unique"):
        await generate(engine, requests[:1])
    first.cancel()


async def test_an_aborted_request_comes_with_what_it_has_and_the_others_go_on(model_dirs):
    engine = make_engine(model_dirs["llama"], max_batch_size=4)
    decoding, waiting, other = make_requests(SamplingParams(max_response_tokens=60), num_samples=2)[:3]
    expected = await generate(engine, [decoding, waiting, other])
    other_alone = asyncio.create_task(generate(engine, [other]))
    aborted = asyncio.create_task(generate(engine, [decoding, waiting]))
    while await engine._in_worker(lambda: engine._decoding._rows.num_rows if engine._decoding else 0) < 4:
        pass  # the worker looks between two pieces of 16 steps: none of 60 ends unseen
    await engine.abort([decoding.request_id, waiting.request_id, 999])
    results = await aborted
    assert {sample.finish_reason for samples in results.values() for sample in samples} == {"abort"}
    assert [len(sample.token_ids) for sample in results[waiting.request_id]] == [0, 0]
    for sample, whole in zip(results[decoding.request_id], expected[decoding.request_id], strict=True):
        num_tokens = len(sample.token_ids)
        assert 0 < num_tokens < 60 and len(sample.log_probs) == len(sample.weight_versions) == num_tokens
        assert sample.token_ids.tolist() == whole.token_ids[:num_tokens].tolist()
    assert_same_samples(await other_alone, {other.request_id: expected[other.request_id]})


def cut(sample: Sample, num_tokens: int) -> Sample:
    """As it was when it had so many tokens."""
    columns = (sample.token_ids[:num_tokens], sample.log_probs[:num_tokens], sample.weight_versions[:num_tokens])
    return Sample(*columns, finish_reason="abort", text="")


@pytest.mark.parametrize("family", FAMILIES)
async def test_a_started_sample_goes_on_as_if_it_had_not_been_interrupted(family, model_dirs):
    engine = make_engine(model_dirs[family], max_batch_size=5)
    requests = make_requests(SamplingParams(max_response_tokens=12), num_samples=4)
    whole = await generate(engine, requests)
    cuts = [0, 5, 11, 12]
    started = [
        replace(
            request,
            started=tuple(
                sample if length == 12 else cut(sample, length)
                for sample, length in zip(whole[request.request_id], cuts, strict=True)
            ),
        )
        for request in requests
    ]
    assert_same_samples(await generate(engine, started), whole)


async def test_tokens_keep_the_log_probs_and_versions_of_the_weights_they_were_drawn_from(model_dirs, tmp_path):
    engine, (request, *_) = make_engine(model_dirs["qwen2"]), make_requests(SamplingParams(max_response_tokens=8), num_samples=3)
    other_dir = perturbed_copy(model_dirs["qwen2"], tmp_path / "other")
    first = tuple(cut(sample, 5) for sample in (await generate(engine, [request]))[request.request_id])
    buckets, manifest = buckets_of(transformers.AutoModelForCausalLM.from_pretrained(other_dir), version=6)
    for bucket in buckets:
        await engine.receive_bucket(bucket)
    await engine.commit_weights(manifest)
    samples = (await generate(engine, [replace(request, started=first)]))[request.request_id]
    model = transformers.AutoModelForCausalLM.from_pretrained(other_dir)
    for sample, before in zip(samples, first, strict=True):
        assert sample.weight_versions.tolist() == [0] * 5 + [6] * 3
        assert sample.token_ids[:5].tolist() == before.token_ids.tolist()
        assert sample.log_probs[:5].tolist() == before.log_probs.tolist()
        reference = reference_log_probs(model, request.prompt_token_ids, sample.token_ids, 1.0)
        expected = reference.gather(1, torch.tensor(sample.token_ids)[:, None].long())[5:, 0]
        torch.testing.assert_close(torch.tensor(sample.log_probs[5:]), expected, atol=1e-5, rtol=0)


async def test_a_request_with_nothing_left_to_generate_comes_back_as_it_is(model_dirs):
    engine, requests = make_engine(model_dirs["llama"]), make_requests(SamplingParams(max_response_tokens=3))
    whole = await generate(engine, requests)
    again = [replace(request, started=whole[request.request_id]) for request in requests]
    assert await generate(engine, again) == whole


@pytest.mark.parametrize(("num_started", "num_tokens", "problem"), [(2, 1, "2 started samples of 3"), (3, 8, "no token left")])
def test_started_samples_that_cannot_go_on_are_refused(num_started, num_tokens, problem):
    started = Sample((1,) * num_tokens, (0.0,) * num_tokens, (0,) * num_tokens, "abort", "")
    with pytest.raises(EngineError, match=problem):
        GenerateRequest(0, (1,), 3, 0, SamplingParams(max_response_tokens=8), (started,) * num_started)


async def test_cancelled_consumer_leaves_the_engine_usable(model_dirs):
    engine = make_engine(model_dirs["llama"])
    endless = asyncio.create_task(generate(engine, make_requests(SamplingParams(max_response_tokens=200))))
    await asyncio.sleep(0.02)
    endless.cancel()
    with pytest.raises(asyncio.CancelledError):
        await endless
    assert len(await generate(engine, make_requests(GREEDY))) == len(PROMPTS)


async def test_weights_that_are_not_finite_are_an_error_that_names_the_version(model_dirs):
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dirs["llama"])
    model.model.norm.weight.data[0] = torch.nan
    engine = make_engine(model_dirs["llama"])
    buckets, manifest = buckets_of(model, version=3)
    for bucket in buckets:
        await engine.receive_bucket(bucket)
    await engine.commit_weights(manifest)
    with pytest.raises(EngineError, match="not finite with weights of version 3"):
        await generate(engine, make_requests(GREEDY))


def test_model_with_a_sliding_window_is_refused(model_dirs, tmp_path):
    sliding = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    make_hf_model(tmp_path, "qwen2", vocab_size=VOCAB_SIZE, **sliding)
    transformers.AutoTokenizer.from_pretrained(model_dirs["qwen2"]).save_pretrained(tmp_path)
    with pytest.raises(EngineError, match="sliding_attention"):
        make_engine(tmp_path)
