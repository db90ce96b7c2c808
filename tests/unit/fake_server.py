"""A server with SGLang's answers and no model: the token at position p of a sequence is p, and goes to experts p and p + 1, modulo 8."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
from collections.abc import Collection, Sequence

import numpy as np
from aiohttp import web

from dapo_megatron.types import EngineEndpoint


def routed_experts(start: int, end: int) -> np.ndarray:
    """[end - start, 2 layers, 2 experts]: of the tokens at these positions."""
    first = np.arange(start, end)[:, None]
    return np.stack([(first + choice) % 8 for choice in (0, 1)], axis=-1).repeat(2, axis=1).astype(np.int32)


class FakeServer:
    """Serves in the running event loop. `die` and `hang` are what may happen to a server."""

    def __init__(self, name: str, weight_version: int = 0, seconds_per_token: float = 0.0):
        self.name, self.weight_version, self.seconds_per_token = name, weight_version, seconds_per_token
        self.prompts: list[list[int]] = []
        """Token ids that samples of this server began with."""
        self.aborted: set[str] = set()
        self.num_flushes = 0
        self.memory_calls: list[str] = []
        self.may_generate = asyncio.Event()
        self.may_generate.set()
        self.pauses_after: int | None = None
        """Tokens of a sample after which no more come, until it dies."""
        self.hangs = asyncio.Event()
        self.status = 200
        self.dies_of_requests = False
        self.num_faults = 0
        """Samples that it will end after their next token, of its own accord."""
        self.max_request_tokens: int | None = None
        """Prompt and response; a longer one is cut short, as SGLang does it."""
        self.info = {"max_req_input_len": 4090, "max_total_num_tokens": 65536, "page_size": 1}
        self.is_busy = False
        """Something runs that nobody waits for."""
        self.generated = asyncio.Event()
        """Set with the first token that is sent."""
        self.tokens_per_piece = 1
        """But for the first token of a sample, which is sent at once."""
        self.prefix_keys: list[str] = []
        self.pauses: list[str] = []
        self.paused: str | None = None
        """The mode of the pause."""
        self._goes_on = asyncio.Event()
        self._goes_on.set()
        self.num_running = 0
        """Samples that have not come to their end."""

    async def start(self) -> EngineEndpoint:
        app = web.Application()
        app.router.add_post("/generate", self._generate)
        app.router.add_post("/abort_request", self._abort)
        app.router.add_post("/pause_generation", self._pause)
        app.router.add_post("/continue_generation", self._continue)
        app.router.add_post("/release_memory_occupation", self._release)
        app.router.add_post("/resume_memory_occupation", self._resume)
        app.router.add_post("/flush_cache", self._flush_cache)
        app.router.add_get("/model_info", self._model_info)
        app.router.add_get("/server_info", self._server_info)
        app.router.add_get("/health_generate", self._health)
        self._runner = web.AppRunner(app, shutdown_timeout=0.0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        host, port = self._runner.addresses[0][:2]
        return EngineEndpoint(self.name, f"http://{host}:{port}", 1, "cuda")

    async def die(self) -> None:
        """Connections are reset and nobody listens any more."""
        if self._runner.server is None:
            return
        self.pauses_after = None  # handlers that wait would outlive it
        self.may_generate.set()
        self._goes_on.set()
        for connection in self._runner.server.connections:
            if connection.transport is not None:
                connection.transport.abort()
        await self._runner.cleanup()

    def hang(self) -> None:
        """Connections stay, nothing comes."""
        self.may_generate.clear()
        self.hangs.set()

    async def _health(self, request: web.Request) -> web.Response:
        if self.hangs.is_set() or self.paused is not None:
            await asyncio.sleep(3600)
        return web.Response()

    async def _pause(self, request: web.Request) -> web.Response:
        if self.hangs.is_set():
            await asyncio.sleep(3600)
        self.paused = (await request.json())["mode"]
        self.pauses.append(self.paused)
        self._goes_on.clear()
        return web.json_response(None)

    async def _continue(self, request: web.Request) -> web.Response:
        if self.hangs.is_set():
            await asyncio.sleep(3600)
        self.paused = None
        self._goes_on.set()
        return web.json_response(None)

    async def _model_info(self, request: web.Request) -> web.Response:
        return web.json_response({"weight_version": str(self.weight_version)})

    async def _server_info(self, request: web.Request) -> web.Response:
        return web.json_response(self.info)

    async def _flush_cache(self, request: web.Request) -> web.Response:
        waits_in_vain = self.paused == "retract" and self.num_running and float(request.query["timeout"]) > 0
        if self.is_busy or self.paused == "in_place" or waits_in_vain:
            return web.Response(text="Flush cache failed.", status=400)
        self.num_flushes += 1
        return web.Response(text="Cache flushed.")

    async def _release(self, request: web.Request) -> web.Response:
        self.memory_calls += [f"release {tag}" for tag in (await request.json())["tags"]]
        return web.json_response(None)

    async def _resume(self, request: web.Request) -> web.Response:
        self.memory_calls += [f"resume {tag}" for tag in (await request.json())["tags"]]
        return web.json_response(None)

    async def _abort(self, request: web.Request) -> web.Response:
        self.aborted.add((await request.json())["rid"])
        return web.Response()

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        await self._goes_on.wait()
        self.prompts += body["input_ids"]
        self.prefix_keys.append(body["extra_key"])
        if self.dies_of_requests:
            assert request.transport is not None
            request.transport.abort()
        if self.status != 200:
            return web.Response(text="no", status=self.status)
        response = web.StreamResponse()
        await response.prepare(request)
        lock = asyncio.Lock()

        async def sample(index: int, rid: str, token_ids: Collection[int], limit: int) -> None:
            start = len(token_ids)
            versions: list[int] = []
            num_sent = 0
            if self.max_request_tokens is not None:
                limit = min(limit, self.max_request_tokens - start)
            for count in range(1, limit + 1):
                await asyncio.sleep(self.seconds_per_token)
                if self.pauses_after is not None and count > self.pauses_after:
                    self.may_generate.clear()
                await self.may_generate.wait()
                await self._goes_on.wait()
                versions.append(self.weight_version)
                end = "abort" if rid in self.aborted or self.num_faults else "length" if count == limit else None
                self.num_faults -= bool(self.num_faults)
                if not end and num_sent and count - num_sent < self.tokens_per_piece:
                    continue
                new = range(start + num_sent, start + count)
                num_sent = count
                meta = {
                    "id": rid,
                    "finish_reason": {"type": end, "message": "Out of memory"} if end else None,
                    "output_token_logprobs": [[-0.5, token, None] for token in new],
                    "weight_version": str(self.weight_version),
                    **({"weight_versions": _spans(versions)} if end else {}),
                    "completion_tokens": count,
                }
                if end and body.get("return_routed_experts"):
                    rows = routed_experts(body["routed_experts_start_len"], start + count - 1)
                    meta["routed_experts"] = base64.b64encode(rows.tobytes()).decode()
                event = {"index": index, "output_ids": list(new), "meta_info": meta}
                async with lock:
                    await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
                self.generated.set()
                if end:
                    return

        limits = [params["max_new_tokens"] for params in body["sampling_params"]]
        self.num_running += len(limits)
        try:
            await asyncio.gather(*map(sample, range(len(limits)), body["rid"], body["input_ids"], limits))
        finally:
            self.num_running -= len(limits)
        await response.write(b"data: [DONE]\n\n")
        return response


def _spans(versions: Sequence[int]) -> list[dict[str, object]]:
    """Of equal versions in a row, as SGLang tells them."""
    spans: list[dict[str, object]] = []
    for version, places in itertools.groupby(range(len(versions)), key=versions.__getitem__):
        first, *rest = places
        spans.append({"version": str(version), "start": first, "end": (rest or [first])[-1] + 1})
    return spans
