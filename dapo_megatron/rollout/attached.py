"""Servers that somebody else runs (`rollout.engine.engine_urls`): what they must be, and waiting for one that was lost."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal
from urllib.parse import urlsplit

from dapo_megatron.config.schema import SglangEngineConfig
from dapo_megatron.rollout.sglang_engine import SglangEngine
from dapo_megatron.rollout.sglang_server import IN_PLACE_WATCHDOG_SECONDS
from dapo_megatron.types import EngineEndpoint, EngineError, EngineLostError

CALL_SECONDS = 60.0
POLL_SECONDS = 2.0
_NEEDED = {"skip_tokenizer_init": True, "incremental_streaming_output": True}


async def attach(config: SglangEngineConfig) -> list[EngineEndpoint]:
    """The endpoints of `engine_urls`. EngineError when a server does not answer or was started without what the client needs."""
    return list(await asyncio.gather(*(_attach(config, index) for index in range(len(config.engine_urls)))))


class Reattach:
    """In place of a restart: waits until the server answers again, whoever starts it."""

    def __init__(self, config: SglangEngineConfig, endpoints: Sequence[EngineEndpoint]):
        self._config, self._endpoints = config, list(endpoints)

    async def __call__(self, name: str) -> EngineEndpoint:
        """The endpoint in its next life. EngineError when what answers was not started as it must be."""
        index = next(index for index, endpoint in enumerate(self._endpoints) if endpoint.name == name)
        client = SglangEngine(self._endpoints[index])
        try:
            while not await _answers(client):
                await asyncio.sleep(POLL_SECONDS)
        finally:
            await client.close()
        self._endpoints[index] = replace(await _attach(self._config, index), life=self._endpoints[index].life + 1)
        return self._endpoints[index]


async def _answers(client: SglangEngine) -> bool:
    try:
        await client.resume(CALL_SECONDS)  # a server that is paused answers nothing else
        return await client.is_healthy(CALL_SECONDS)
    except EngineLostError:
        return False


async def _attach(config: SglangEngineConfig, index: int) -> EngineEndpoint:
    url = config.engine_urls[index]
    key = os.environ[config.api_key_env] if config.api_key_env else None
    found = EngineEndpoint(f"engine {index}", url, config.tensor_parallel_size, "cuda", urlsplit(url).hostname or "", key)
    client = SglangEngine(found)
    try:
        info: dict[str, Any] = await client.get("/server_info", timeout_seconds=CALL_SECONDS)
        await client.resume(CALL_SECONDS)  # a run that was killed may have left it paused
    finally:
        await client.close()
    wanted = _NEEDED | {"tp_size": config.tensor_parallel_size}
    if config.return_routed_experts:
        wanted |= {"enable_return_routed_experts": True}
    wrong = [f"{name} {info.get(name)} instead of {value}" for name, value in wanted.items() if info.get(name) != value]
    pauses = config.pause_mode == "in_place"
    if pauses and (info.get("watchdog_timeout") or 0) < IN_PLACE_WATCHDOG_SECONDS:
        wrong.append(f"watchdog_timeout {info.get('watchdog_timeout')}, which ends a server that is paused in place for longer")
    if wrong:
        flags = f"--skip-tokenizer-init --incremental-streaming-output --tp-size {config.tensor_parallel_size}"
        flags += " --enable-return-routed-experts" if config.return_routed_experts else ""
        flags += f" --watchdog-timeout {IN_PLACE_WATCHDOG_SECONDS}" if pauses else ""
        raise EngineError(f"the server at {url} was started with {', '.join(wrong)}; start it with {flags}.")
    device: Literal["cpu", "cuda"] = "cpu" if info.get("device") == "cpu" else "cuda"
    return EngineEndpoint(found.name, url, config.tensor_parallel_size, device, found.node, key)
