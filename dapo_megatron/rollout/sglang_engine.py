"""One SGLang server over HTTP: token ids in; token ids, log-probs and weight versions out, as they come.

No routing, no second try: `router.py` decides what happens when a server is lost. Every call raises EngineLostError when the server
is gone or silent past the deadline, and EngineError when it refuses (its words, and the end of its log).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Literal

import aiohttp

from dapo_megatron.rollout.engine import SamplingParams
from dapo_megatron.types import EngineEndpoint, EngineError, EngineLostError, FinishReason

MemoryTag = Literal["weights", "kv_cache", "cuda_graph"]
_MAX_EVENT_BYTES = 2**30
"""The routed experts of a long response come in one line."""


@dataclass(frozen=True, slots=True)
class Continuation:
    """What one sample goes on from. `rid` names it on the server."""

    rid: str
    token_ids: Sequence[int]
    """The prompt and what has been sampled already."""
    max_new_tokens: int


@dataclass(frozen=True, slots=True)
class Piece:
    """New tokens of one sample; all three columns have one entry per token."""

    token_ids: Sequence[int]
    log_probs: Sequence[float]
    """nats, of logits / temperature; top-k and top-p are not accounted for."""
    weight_versions: Sequence[int]
    """SGLang 0.5.23 tells which token is whose only with the last piece: in one that spans an update all tokens have the newer version."""
    finish_reason: FinishReason | None
    """None: more will come."""
    reason: str = ""
    """Why the server ended it, for an abort."""
    versions_of_all: Sequence[int] = ()
    """With the last piece: of every token since the request began."""
    routed_experts: str | None = None
    """base64 of int32 [tokens, layers, top_k], of all tokens from the one asked for to the last but one; with the last piece."""


class SglangEngine:
    """A client of one server; to be used in one event loop, and closed there."""

    def __init__(self, endpoint: EngineEndpoint):
        self.endpoint = endpoint
        self._open_session: aiohttp.ClientSession | None = None
        self._is_closed = False

    async def close(self) -> None:
        """Give back the connections; what is in flight, and every later call, ends with EngineLostError."""
        self._is_closed = True
        session, self._open_session = self._open_session, None
        if session is not None:
            await session.close()

    async def stream(
        self,
        continuations: Sequence[Continuation],
        params: SamplingParams,
        take: Callable[[int, Piece], None],
        routed_experts_from: int | None = None,
        prefix_key: str | None = None,
    ) -> None:
        """Sample all to their end; `take` gets each piece with the index of its continuation, as it comes.

        `routed_experts_from`: the token from which on the experts of each sample are wanted. `prefix_key`: cached prefixes are shared
        with requests of the same key alone. Leaving early (a cancelled task) ends the samples on the server.
        """
        common = {
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k or -1,
            "stop_token_ids": list(params.stop_token_ids),
        }
        body = {
            "rid": [item.rid for item in continuations],
            "input_ids": [list(item.token_ids) for item in continuations],
            "sampling_params": [common | {"max_new_tokens": item.max_new_tokens} for item in continuations],
            "return_logprob": True,
            "stream": True,
        }
        if routed_experts_from is not None:
            body |= {"return_routed_experts": True, "routed_experts_start_len": routed_experts_from}
        if prefix_key is not None:
            body |= {"extra_key": prefix_key}
        counts = [0] * len(continuations)
        unfinished = set(range(len(continuations)))
        try:
            async with self._session().post("/generate", json=body, timeout=aiohttp.ClientTimeout(total=None)) as response:
                if response.status != 200:
                    raise await self._refused("/generate", response)
                async for line in response.content:
                    if not line.startswith(b"data: {"):
                        continue
                    event = json.loads(line[6:])
                    if "error" in event:
                        raise EngineError(f"{self.endpoint.name} refused to generate: {event['error'].get('message')}")
                    finish = event["meta_info"].get("finish_reason") or {}
                    if HTTPStatus.BAD_REQUEST <= (finish.get("status_code") or 0) < HTTPStatus.INTERNAL_SERVER_ERROR:
                        raise EngineError(f"{self.endpoint.name} refused to generate: {finish.get('message')}")
                    index = event["index"]
                    piece = _piece(event, counts[index])
                    counts[index] += len(piece.token_ids)
                    if piece.finish_reason is not None:
                        unfinished.discard(index)
                    take(index, piece)
        except (aiohttp.ClientError, ConnectionError, TimeoutError) as error:
            raise self._lost(error) from error
        if unfinished:
            raise self._lost("it closed the connection before the samples were finished")

    async def post(self, path: str, body: dict[str, Any] | None = None, *, timeout_seconds: float) -> Any:
        """The server's answer to a request; None for an empty one."""
        return await self._request("POST", path, body or {}, timeout_seconds)

    async def get(self, path: str, *, timeout_seconds: float) -> Any:
        """As `post`."""
        return await self._request("GET", path, None, timeout_seconds)

    async def is_healthy(self, timeout_seconds: float) -> bool:
        """Whether tokens come out of it now. EngineLostError when it cannot be reached; False when it says no or nothing."""
        timeout = aiohttp.ClientTimeout(total=timeout_seconds)
        try:
            async with self._session().get("/health_generate", timeout=timeout) as response:
                return response.status == 200
        except TimeoutError:
            return False
        except (aiohttp.ClientError, ConnectionError) as error:
            raise self._lost(error) from error

    async def weight_version(self, timeout_seconds: float) -> int:
        """Of the weights that it holds, as the last update said."""
        return _version((await self.get("/model_info", timeout_seconds=timeout_seconds))["weight_version"])

    async def abort(self, rid: str, timeout_seconds: float) -> None:
        """End a sample; its stream gets what there is, with finish reason abort. Unknown ones are ignored."""
        await self.post("/abort_request", {"rid": rid}, timeout_seconds=timeout_seconds)

    async def pause(self, mode: Literal["abort", "retract", "in_place"], timeout_seconds: float) -> None:
        """Stop generating; streams stay open, new samples wait. in_place keeps the KV cache, retract gives it up, abort ends the samples."""
        await self.post("/pause_generation", {"mode": mode}, timeout_seconds=timeout_seconds)

    async def resume(self, timeout_seconds: float) -> None:
        """Generate again after `pause`; nothing happens to a server that is not paused."""
        await self.post("/continue_generation", timeout_seconds=timeout_seconds)

    async def flush_cache(self, timeout_seconds: float, *, waits: bool = True) -> None:
        """Forget all prefixes. EngineLostError when samples that nobody waits for still run at the deadline: only a restart ends them.

        `waits` False, for a server that is paused (retract): at once, as one that waits would wait for the paused samples too.
        """
        path = f"/flush_cache?timeout={timeout_seconds / 2 if waits else 0:g}"
        try:
            await self.post(path, timeout_seconds=timeout_seconds)
        except EngineError as error:
            raise self._lost(error) from error

    async def release_memory(self, tags: Sequence[MemoryTag], timeout_seconds: float) -> None:
        """Give the memory of these parts to whoever shares the device; nothing may be running."""
        await self.post("/release_memory_occupation", {"tags": list(tags)}, timeout_seconds=timeout_seconds)

    async def resume_memory(self, tags: Sequence[MemoryTag], timeout_seconds: float) -> None:
        """Take it back; the content of weights is to be sent again."""
        await self.post("/resume_memory_occupation", {"tags": list(tags)}, timeout_seconds=timeout_seconds)

    async def _request(self, method: str, path: str, body: dict[str, Any] | None, timeout_seconds: float) -> Any:
        timeout = aiohttp.ClientTimeout(total=timeout_seconds)
        try:
            async with self._session().request(method, path, json=body, timeout=timeout) as response:
                if response.status != 200:
                    raise await self._refused(path, response)
                return await response.json(content_type=None)
        except json.JSONDecodeError:
            return None
        except (aiohttp.ClientError, ConnectionError, TimeoutError) as error:
            raise self._lost(f"{path}: {type(error).__name__} {error}") from error

    async def _refused(self, path: str, response: aiohttp.ClientResponse) -> EngineError:
        """A fault of the server (5xx) counts as its loss."""
        words = f"it answered {path} with status {response.status}: {(await response.text())[:2000] or '(no words)'}"
        return self._lost(words) if response.status >= 500 else EngineError(f"{self.endpoint.name} refuses: {words}")

    def _lost(self, cause: object) -> EngineLostError:
        words = str(cause) or type(cause).__name__
        return EngineLostError(f"{self.endpoint.name} ({self.endpoint.url}) is lost: {words}", self.endpoint.name)

    def _session(self) -> aiohttp.ClientSession:
        """Made on first use, as it belongs to the running loop."""
        if self._is_closed:
            raise self._lost("its connections are closed")
        if self._open_session is None:
            key = self.endpoint.api_key
            self._open_session = aiohttp.ClientSession(
                self.endpoint.url,
                headers={"Authorization": f"Bearer {key}"} if key else {},
                connector=aiohttp.TCPConnector(limit=0),  # a sample is a stream; the server decides how many run
                read_bufsize=_MAX_EVENT_BYTES,
            )
        return self._open_session


def _piece(event: dict[str, Any], num_before: int) -> Piece:
    """One event of the stream (`incremental_streaming_output`); `num_before` tokens of the sample came earlier."""
    meta = event["meta_info"]
    # A sample aborted while it waits repeats its last token behind the new ones, and all log-probs; the count is right.
    num_new = max(meta["completion_tokens"] - num_before, 0)
    finish = meta.get("finish_reason") or {}
    if "status_code" in finish and not meta.get("output_token_logprobs"):
        num_new = 0  # a sample that failed before it began has a token that stands in for none
    token_ids = (event.get("output_ids") or [])[:num_new]
    log_probs = [entry[0] for entry in (meta.get("output_token_logprobs") or [])[-num_new:]] if num_new else []
    if not num_new == len(log_probs) == len(token_ids):
        raise EngineError(
            f"a SGLang server sent {len(token_ids)} tokens with {len(log_probs)} log-probs where {num_new} are new; start it with "
            "--skip-tokenizer-init --incremental-streaming-output."
        )
    return Piece(
        token_ids=token_ids,
        log_probs=log_probs,
        weight_versions=_versions(meta, num_before, num_before + len(token_ids)),
        finish_reason=finish.get("type"),
        reason=str(finish.get("message") or ""),
        versions_of_all=_versions(meta, 0, num_before + num_new) if meta.get("weight_versions") else (),
        routed_experts=meta.get("routed_experts"),
    )


def _versions(meta: dict[str, Any], start: int, end: int) -> list[int]:
    """One version per token of [start, end), from the spans over all tokens of the request so far."""
    spans = meta.get("weight_versions") or [{"version": meta.get("weight_version", "-1"), "start": 0, "end": end}]
    return [_version(span["version"]) for span in spans for _ in range(max(start, span["start"]), min(end, span["end"]))]


def _version(name: str) -> int:
    """Of a server that was never updated it is 0, as SGLang's own name for it."""
    return 0 if name == "default" else int(name)
