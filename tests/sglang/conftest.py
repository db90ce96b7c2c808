"""Real SGLang servers, shared by all tests: a start costs 15 seconds of CPU.

The pair is started once; a test that kills one of it or changes its weights leaves that to the next one's fixture to mend.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from dapo_megatron.config.schema import SglangEngineConfig
from dapo_megatron.examples.max_of_two import save_tokenizer
from dapo_megatron.rollout.fleet import Restart
from dapo_megatron.rollout.router import Router
from dapo_megatron.rollout.sglang_engine import SglangEngine
from dapo_megatron.rollout.sglang_server import ServerSpec, SglangServer
from dapo_megatron.types import EngineEndpoint, EngineError, Sample
from tests.sglang.weight_sync_ranks import post
from tests.tiny_models import make_hf_model

needs_sglang = pytest.mark.skipif(find_spec("sglang") is None, reason="pip install 'dapo-megatron[sglang]'")

MAX_DIFFERENCE = 1e-5
"""nats, between fp32 log-probs of the server and of transformers."""
SIZES = {"num_hidden_layers": 2, "intermediate_size": 128, "max_position_embeddings": 2048}


@dataclass
class Pair:
    """Two servers of one tiny fp32 Llama, with one API key. Its tokenizer knows the characters of the quick start."""

    model: Path
    servers: dict[str, SglangServer]
    config: SglangEngineConfig

    @property
    def endpoints(self) -> list[EngineEndpoint]:
        return [server.endpoint for server in self.servers.values()]

    def restore_all(self) -> None:
        """Both."""
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(self.restore, self.servers))

    def restore(self, name: str) -> None:
        """A server that is alive and has the weights of the model's directory, whatever was done to it."""
        server = self.servers[name]
        try:
            version = weight_version_of(server.endpoint)
        except EngineError:
            server.stop()
            server.start(280)
            return
        if version != 0:
            post(server.endpoint, "/update_weights_from_disk", model_path=str(self.model), weight_version="0")


@pytest.fixture(scope="session")
def starting_pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Future[Pair]]:
    """The pair while it starts: tests that do not need it yet can go ahead."""
    folder = tmp_path_factory.mktemp("pair")
    model = make_hf_model(folder / "model", "llama", **SIZES)
    save_tokenizer(model)
    config = SglangEngineConfig(
        dtype="fp32", max_total_tokens=8192, stream_interval_tokens=4, health_interval_seconds=1, health_deadline_seconds=20
    )
    servers = {
        name: SglangServer(
            ServerSpec(name=name, model_dir=model, config=config, extra={}, device="cpu", random_seed=seed),
            folder / f"{name.replace(' ', '_')}.log",
        )
        for seed, name in enumerate(("engine 0", "engine 1"))
    }
    servers["engine 1"]._api_key = servers["engine 0"]._api_key

    def start() -> Pair:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda server: server.start(280), servers.values()))
        return Pair(model, servers, config)

    try:
        with ThreadPoolExecutor(1) as pool:
            yield pool.submit(start)
    finally:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(SglangServer.stop, servers.values()))


@pytest.fixture
def pair(starting_pair: Future[Pair]) -> Pair:
    pair = starting_pair.result()
    pair.restore_all()
    return pair


async def no_restart(name: str) -> EngineEndpoint:
    raise EngineError(f"{name} is not started again in this test")


@asynccontextmanager
async def routed(pair: Pair, restart: Restart = no_restart, pause_mode: str | None = None) -> AsyncIterator[Router]:
    """A router over the pair, at the weight version that it holds; texts are the token ids. `pause_mode` None: nothing is held."""
    config = pair.config.model_copy(update={"pause_mode": pause_mode, "restart_deadline_seconds": 20.0} if pause_mode else {})
    pauses = pause_mode is not None
    router = Router(
        pair.endpoints,
        config,
        lambda rows: [str(row) for row in rows],
        restart=restart,
        mixes_versions=pauses,
        may_pause=pauses,
    )
    client = SglangEngine(pair.endpoints[0])
    router.weight_version = await client.weight_version(30)
    try:
        yield router
    finally:
        await asyncio.gather(client.close(), router.close())


def weight_version_of(endpoint: EngineEndpoint) -> int:
    async def ask() -> int:
        client = SglangEngine(endpoint)
        try:
            return await client.weight_version(30)
        finally:
            await client.close()

    return asyncio.run(ask())


def other_weights(model: Path, folder: Path, seed: int) -> Path:
    """The same model with other weights."""
    shutil.copytree(model, folder)
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(model / "model.safetensors")
    changed = {name: tensor + 0.05 * torch.randn(tensor.shape, generator=generator) for name, tensor in tensors.items()}
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def reference_of(model: Path) -> transformers.PreTrainedModel:
    """transformers, fp32."""
    return transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


@torch.no_grad()
def log_probs_of(
    model: transformers.PreTrainedModel, prompt: tuple[int, ...], sample: Sample, temperature: float = 1.0
) -> torch.Tensor:
    """[T, V]: of every token at each place of the response."""
    logits = model(torch.tensor([[*prompt, *sample.token_ids.tolist()]])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits / temperature, dim=-1)
