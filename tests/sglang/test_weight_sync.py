"""Weights of real megatron-core ranks in real servers: what a server then generates is what transformers generates."""

from __future__ import annotations

import asyncio
import json
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dapo_megatron.config.schema import SglangEngineConfig
from dapo_megatron.rollout.engine import GenerateRequest, GenerateResult, SamplingParams
from dapo_megatron.rollout.routed_experts import ExpertShape
from dapo_megatron.rollout.router import Router
from dapo_megatron.rollout.sglang_server import ServerSpec, SglangServer
from dapo_megatron.types import EngineEndpoint
from dapo_megatron.weights.transports.records import PushReport, PushRules, Transport
from tests.distributed.programs import make_config
from tests.distributed.ranks import run_ranks
from tests.sglang import weight_sync_ranks
from tests.sglang.conftest import (
    MAX_DIFFERENCE,
    SIZES,
    Pair,
    needs_sglang,
    no_restart,
    other_weights,
    reference_of,
)
from tests.sglang.weight_sync_ranks import post
from tests.tiny_models import make_hf_model

pytestmark = [
    pytest.mark.sglang,
    needs_sglang,
    pytest.mark.timeout(400),
]

FAMILIES = {"llama": 1, "qwen2": 2, "qwen3": 1, "qwen3_moe": 2}
"""Family -> tensor_parallel_size of its engine."""
LAYOUTS: dict[str, dict[str, Any]] = {"tp1": {}, "tp2": {"tensor_parallel_size": 2}, "pp2": {"pipeline_parallel_size": 2}}
TRANSPORTS: dict[str, tuple[Transport, ...]] = {
    "tp1": ("distributed", "disk", "tensor"),
    "tp2": ("tensor", "disk", "distributed"),
    "pp2": ("tensor", "distributed", "disk"),
}
"""Layout -> transports that are used one after the other; the server generates with what the last one brought."""
TRANSPORT_AT_DEATH: dict[str, Transport] = {
    "qwen2": "distributed",
    "llama": "tensor",
    "qwen3": "tensor",
    "qwen3_moe": "distributed",
}
MOE_SIZES = {"moe_intermediate_size": 64}
PROMPTS = [[5, 17, 33, 2], [90, 4], [8, 8, 61, 44, 29, 73, 11], [100, 1, 50]]
NUM_NEW_TOKENS = 12
BUCKET_BYTES = 100_000
"""A version is several buckets."""


@dataclass
class Served:
    """A server, the model it was started with, and the version it has."""

    family: str
    model: Path
    server: SglangServer
    version: int = 0

    @property
    def endpoint(self) -> EngineEndpoint:
        return self.server.endpoint


@pytest.fixture(scope="module", params=FAMILIES)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    family: str = request.param
    if family == "llama":
        pair: Pair = request.getfixturevalue("starting_pair").result()
        pair.restore("engine 0")
        yield Served(family, pair.model, pair.servers["engine 0"])
        return
    folder = tmp_path_factory.mktemp(family)
    model = make_hf_model(folder / "model", family, **SIZES | MOE_SIZES if family == "qwen3_moe" else SIZES)
    config = SglangEngineConfig(
        tensor_parallel_size=FAMILIES[family],
        dtype="fp32",
        max_total_tokens=4096,
        return_routed_experts=family == "qwen3_moe",
        stream_interval_tokens=4,
    )
    server = SglangServer(ServerSpec(name="engine 0", model_dir=model, config=config, extra={}, device="cpu"), folder / "log")
    try:
        server.start(300)
        yield Served(family, model, server)
    finally:
        server.stop()


def rules(folder: Path) -> PushRules:
    return PushRules(bucket_bytes=BUCKET_BYTES, dtype="float32", directory=folder / "versions", timeout_seconds=60)


def push(served: Served, model: Path, layout: str, transports: tuple[Transport, ...], folder: Path) -> list[PushReport]:
    config = make_config(model, **LAYOUTS[layout])
    versions = {served.version + 1 + index: {served.endpoint: transport} for index, transport in enumerate(transports)}
    served.version += len(transports)
    return run_ranks(weight_sync_ranks.push, config.actor.world_size, config, versions, rules(folder))[0]


@torch.no_grad()
def assert_generates_as_transformers(endpoint: EngineEndpoint, model: Path, version: int) -> None:
    """Greedy tokens are equal and their fp32 log-probs agree; every answer bears the version."""
    reference = reference_of(model)
    sampling = {"temperature": 0, "max_new_tokens": NUM_NEW_TOKENS, "ignore_eos": True}
    post(endpoint, "/flush_cache")
    answers = post(endpoint, "/generate", input_ids=PROMPTS, sampling_params=sampling, return_logprob=True)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        log_probs, tokens = zip(*((entry[0], entry[1]) for entry in answer["meta_info"]["output_token_logprobs"]), strict=True)
        wanted = torch.log_softmax(reference(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1], dim=-1)
        assert list(tokens) == wanted.argmax(dim=-1).tolist()
        assert (wanted.max(dim=-1).values - torch.tensor(log_probs)).abs().max() <= MAX_DIFFERENCE
        assert answer["meta_info"]["weight_version"] == str(version)


async def assert_routes_as_transformers(served: Served, model: Path) -> None:
    """Samples have the experts of each token but the last, those of an aborted and continued one included."""
    hf_config = json.loads((model / "config.json").read_text())
    experts = ExpertShape.of(hf_config)
    assert experts == ExpertShape(hf_config["num_hidden_layers"], 2, 8)
    router = Router([served.endpoint], SglangEngineConfig(), lambda rows: ["" for _ in rows], restart=no_restart, experts=experts)
    router.weight_version = served.version
    params = SamplingParams(max_response_tokens=60)
    requests = [GenerateRequest(index, tuple(prompt), 2, 0, params) for index, prompt in enumerate(PROMPTS)]
    try:
        work = asyncio.ensure_future(_complete(router, requests))
        await asyncio.sleep(0.2)
        await router.abort([0, 1])
        first = await work
        results = await _complete(router, [replace(item, started=first[item.request_id].samples) for item in requests])
    finally:
        await router.close()
    reference = reference_of(model)
    for item in requests:
        for sample in results[item.request_id].samples:
            tokens = torch.tensor([[*item.prompt_token_ids, *sample.token_ids.tolist()]])
            with torch.no_grad():
                logits = torch.stack(reference(tokens, output_router_logits=True).router_logits)  # [layers, tokens, experts]
            wanted = logits[:, :-1].topk(2).indices.sort(dim=-1).values.transpose(0, 1)
            assert sample.routed_experts is not None and sample.routed_experts.dtype == np.uint8
            assert len(sample.token_ids) == 60 and sample.routed_experts.shape == (tokens.shape[1] - 1, experts.num_layers, 2)
            np.testing.assert_array_equal(np.sort(sample.routed_experts, axis=-1), wanted.numpy())


async def _complete(router: Router, requests: list[GenerateRequest]) -> dict[int, GenerateResult]:
    return {result.request_id: result async for result in router.generate(requests)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_server_generates_with_the_weights_of_the_ranks(served: Served, layout: str, tmp_path: Path):
    """After every transport the hashes of all tensors agree; the ranks' program wipes the server's tensors before each."""
    model = other_weights(served.model, tmp_path / "model", seed=served.version)
    reports = push(served, model, layout, TRANSPORTS[layout], tmp_path)
    assert [report.failures for report in reports] == [{}] * len(TRANSPORTS[layout])
    num_bytes = sum(tensor.nbytes for tensor in load_file(model / "model.safetensors").values())
    assert {report.num_bytes for report in reports} == {num_bytes} and num_bytes > 2 * BUCKET_BYTES
    assert_generates_as_transformers(served.endpoint, model, served.version)
    assert not list((tmp_path / "versions").iterdir()), "the files of a version go when it has been loaded"
    if served.family == "qwen3_moe":
        asyncio.run(assert_routes_as_transformers(served, model))


def test_requests_in_flight_go_on_with_the_new_weights(served: Served, tmp_path: Path):
    """Paused in place, updated, continued: one response of two versions, and the server says which token is whose."""
    num_tokens, first_token, events = 200, threading.Event(), []
    old = served.version
    body = {"input_ids": [7, 9], "stream": True, "sampling_params": {"max_new_tokens": num_tokens, "ignore_eos": True}}

    def generate() -> None:
        with urllib.request.urlopen(weight_sync_ranks.request(served.endpoint, "/generate", **body), timeout=120) as stream:
            for line in stream:
                if line.startswith(b"data: {"):
                    events.append(json.loads(line[6:]))
                    first_token.set()

    thread = threading.Thread(target=generate)
    thread.start()
    assert first_token.wait(60)
    post(served.endpoint, "/pause_generation", mode="in_place")
    model = other_weights(served.model, tmp_path / "model", seed=served.version)
    assert push(served, model, "tp1", ("tensor",), tmp_path)[0].failures == {}
    post(served.endpoint, "/continue_generation")
    thread.join(120)
    spans = events[-1]["meta_info"]["weight_versions"]
    assert [span["version"] for span in spans] == [str(old), str(served.version)]
    assert spans[0]["start"] == 0 < spans[0]["end"] == spans[1]["start"] < spans[1]["end"] == num_tokens
    assert_generates_as_transformers(served.endpoint, model, served.version)


def test_one_wrong_element_in_a_server_is_found_and_named(served: Served, tmp_path: Path):
    config = make_config(served.model)
    served.version += 1
    arguments = (config, served.version, {served.endpoint: "tensor"}, rules(tmp_path))
    message = run_ranks(weight_sync_ranks.push_and_spoil, 1, *arguments)[0]
    assert f"weights of version {served.version} are not what the engines hold" in message
    for rank in range(FAMILIES[served.family]):
        assert f"tensors of rank {rank} differ from what was sent: model.norm.weight" in message


def test_server_killed_in_the_middle_of_a_sync_is_named_and_ranks_end_the_version(served: Served, tmp_path: Path):
    """The last test of each server."""
    config = make_config(served.model, tensor_parallel_size=2)
    targets = {served.endpoint: TRANSPORT_AT_DEATH[served.family]}
    arguments = (config, served.version + 1, targets, rules(tmp_path), served.server.pid)
    report = run_ranks(weight_sync_ranks.push_and_kill, 2, *arguments)[0]
    assert list(report.failures) == ["engine 0"]
