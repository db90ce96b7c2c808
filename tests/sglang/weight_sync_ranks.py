"""What actor ranks run in the weight sync's tests: real megatron-core ranks that push their weights to servers."""

from __future__ import annotations

import json
import os
import signal
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from dapo_megatron.config.schema import Config
from dapo_megatron.types import EngineEndpoint, FingerprintError
from dapo_megatron.weights.transports.records import PushReport, PushRules, Transport


def push(
    rank: int,
    init_method: str,
    config: Config,
    versions: Mapping[int, Mapping[EngineEndpoint, Transport]],
    rules: PushRules,
    gpu_id: int | None = None,
) -> list[PushReport | None]:
    """Load the config's model and send it as each of `versions`, one after the other; servers forget what they hold in between."""
    pusher = _pusher(rank, init_method, config, rules)
    reports = []
    for version, targets in versions.items():
        if rank == 0:
            for endpoint in targets:
                post(endpoint, "/weights_checker", action="reset_tensors")
        reports.append(pusher.push(version, targets, gpu_id))
    return reports


def push_and_spoil(
    rank: int, init_method: str, config: Config, version: int, targets: Mapping[EngineEndpoint, Transport], rules: PushRules
) -> str:
    """As `push`, and one element of one tensor is written over before the servers are asked; what rank 0 says then."""
    from dapo_megatron.actor import weight_pusher

    pusher = _pusher(rank, init_method, config, rules)
    weight_pusher.TensorChannel = _spoiling(weight_pusher.TensorChannel)  # in this process of its own
    try:
        pusher.push(version, targets)
    except FingerprintError as error:
        return str(error)
    return ""


def push_and_kill(
    rank: int,
    init_method: str,
    config: Config,
    version: int,
    targets: Mapping[EngineEndpoint, Transport],
    rules: PushRules,
    process_group: int,
) -> PushReport | None:
    """As `push`; all processes of the first server are killed (SIGKILL) before the second bucket."""
    from dapo_megatron.weights.transports.server import WeightServer

    pusher = _pusher(rank, init_method, config, rules)
    victim = next(iter(targets))
    for method in ("update_from_tensor", "update_from_group"):
        setattr(WeightServer, method, _killing(getattr(WeightServer, method), victim, process_group))
    return pusher.push(version, targets)


def post(endpoint: EngineEndpoint, path: str, **body: Any) -> Any:
    """The server's answer; an HTTPError for any status but 200."""
    with urllib.request.urlopen(request(endpoint, path, **body), timeout=60) as response:
        text = response.read()
    return json.loads(text) if text.startswith((b"{", b"[")) else text


def request(endpoint: EngineEndpoint, path: str, **body: Any) -> urllib.request.Request:
    headers = {"Authorization": f"Bearer {endpoint.api_key}", "Content-Type": "application/json"}
    return urllib.request.Request(endpoint.url + path, json.dumps(body).encode(), headers)


def _pusher(rank: int, init_method: str, config: Config, rules: PushRules) -> Any:
    from dapo_megatron.actor.live_weights import live_boxes, load_hf
    from dapo_megatron.actor.parallel import initialize
    from dapo_megatron.actor.policy import build_modules
    from dapo_megatron.actor.weight_pusher import WeightPusher
    from dapo_megatron.models.architecture import Architecture
    from dapo_megatron.weights.plan import compile_mapping

    torch.set_num_threads(1)
    hf_config = json.loads((config.model.path / "config.json").read_text())
    device = initialize(config, rank=rank, init_method=init_method)
    modules, _ = build_modules(Architecture.from_hf(hf_config), config, device)
    mapping = compile_mapping(hf_config)
    load_hf(modules, mapping, config.model.path)
    return WeightPusher(mapping, hf_config, live_boxes(modules), rules)


def _spoiling(channel: type) -> type:
    """The channel; what it has sent is written over, in the server, by the same with another element in the last norm."""
    from dapo_megatron.weights.transports.tensor import shared_memory

    class Spoiling(channel):  # type: ignore[misc]
        def send(self, bucket: Any) -> None:
            super().send(bucket)
            if "model.norm.weight" in bucket.tensors():
                spoiled = replace(bucket, payload=shared_memory(bucket.payload.numel()).copy_(bucket.payload))
                spoiled.tensors()["model.norm.weight"][3] += 0.25
                super().send(spoiled)

    return Spoiling


def _killing(method: Callable[..., None], victim: EngineEndpoint, process_group: int) -> Callable[..., None]:
    seen: list[None] = []

    def killing(server: Any, *args: Any) -> None:
        if server.endpoint == victim:
            seen.append(None)
            if len(seen) == 2:
                os.killpg(process_group, signal.SIGKILL)
        method(server, *args)

    return killing
