"""Real SGLang servers, shared: a start costs 20 to 40 seconds of CPU."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

from dapo_megatron.config.schema import SglangEngineConfig
from dapo_megatron.rollout.sglang_server import ServerSpec, SglangServer
from dapo_megatron.types import EngineEndpoint
from tests.tiny_models import make_hf_model

needs_sglang = pytest.mark.skipif(find_spec("sglang") is None, reason="pip install 'dapo-megatron[sglang]'")

STREAM_INTERVAL_TOKENS = 4


@dataclass
class Pair:
    """Two servers of one tiny fp32 model."""

    model: Path
    servers: dict[str, SglangServer]
    config: SglangEngineConfig

    @property
    def endpoints(self) -> list[EngineEndpoint]:
        return [server.endpoint for server in self.servers.values()]


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("pair")
    model = make_hf_model(folder / "model", "qwen3", num_hidden_layers=2)
    config = SglangEngineConfig(
        dtype="fp32",
        max_total_tokens=8192,
        stream_interval_tokens=STREAM_INTERVAL_TOKENS,
        health_interval_seconds=1,
        health_deadline_seconds=20,
    )
    servers = {
        name: SglangServer(
            ServerSpec(name=name, model_dir=model, config=config, extra={}, device="cpu", random_seed=seed),
            folder / f"{name.replace(' ', '_')}.log",
        )
        for seed, name in enumerate(("engine 0", "engine 1"))
    }
    try:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda server: server.start(280), servers.values()))
        yield Pair(model, servers, config)
    finally:
        for server in servers.values():
            server.stop()
