"""Whether servers can take the longest prompt and response: SGLang cuts a response that does not fit short, without a word."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from dapo_megatron.rollout.sglang_engine import SglangEngine
from dapo_megatron.types import EngineEndpoint, EngineError

CALL_SECONDS = 60.0


async def require_room(endpoints: Sequence[EngineEndpoint], num_tokens: int) -> None:
    """EngineError when a server's context or KV cache is too small for a request of `num_tokens`, prompt and response."""
    for endpoint, room in zip(endpoints, await asyncio.gather(*map(_room_of, endpoints)), strict=True):
        if room < num_tokens:
            raise EngineError(
                f"{endpoint.name} has room for {room} tokens a request, but data.max_prompt_tokens and max_response_tokens are "
                f"{num_tokens}: it would cut responses short; raise rollout.engine.mem_fraction_static (or max_total_tokens) or "
                "tensor_parallel_size, or lower max_response_tokens."
            )


async def _room_of(endpoint: EngineEndpoint) -> int:
    client = SglangEngine(endpoint)
    try:
        return room(await client.get("/server_info", timeout_seconds=CALL_SECONDS))
    finally:
        await client.close()


def room(info: Mapping[str, Any]) -> int:
    """Tokens that a request may have on a server that says `info` of itself; a sample may also go on there before its last token."""
    of_context: int = info["max_req_input_len"]
    of_cache: int = info["max_total_num_tokens"] - 2 * (info.get("page_size") or 1)
    return min(of_context, of_cache)
