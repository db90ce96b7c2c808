"""The calls of a rollout server that take weights, over blocking HTTP: actor ranks are synchronous."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

from dapo_megatron.types import EngineEndpoint, EngineError, EngineLostError
from dapo_megatron.weights.transports.channel import StagedTensor


class WeightServer:
    """One server. Every call raises EngineLostError (the server is gone or late) or ServerRefusedError."""

    def __init__(self, endpoint: EngineEndpoint, timeout_seconds: float, model_timeout_seconds: float):
        """`model_timeout_seconds` for calls that work on the whole model at once, `timeout_seconds` for all others."""
        self.endpoint, self._timeout_seconds, self._model_timeout_seconds = endpoint, timeout_seconds, model_timeout_seconds

    def begin(self) -> None:
        """Open an update. One that a sender left open is ended first."""
        try:
            self._post("/begin_weight_update")
        except ServerRefusedError:
            self.end()
            self._post("/begin_weight_update")

    def update_from_tensor(self, payloads: Sequence[str], version: int | None) -> None:
        """Copy tensors out of shared memory; a payload for each rank. `version` names what is held from now on."""
        body = {
            "serialized_named_tensors": list(payloads),
            "load_format": "flattened_bucket",
            "flush_cache": False,
        }
        self._post("/update_weights_from_tensor", body | _naming(version))

    def join_group(self, group_name: str, host: str, port: int, backend: str) -> None:
        """Let the engine's ranks join a process group as ranks 1, 2, ...; returns when all have met."""
        body = {
            "master_address": host,
            "master_port": port,
            "rank_offset": 1,
            "world_size": 1 + self.endpoint.tensor_parallel_size,
            "group_name": group_name,
            "backend": backend,
        }
        self._post("/init_weights_update_group", body)

    def update_from_group(self, group_name: str, tensors: Sequence[StagedTensor], version: int | None) -> None:
        """Receive one broadcast of all `tensors` in a row."""
        body = {
            "names": [tensor.name for tensor in tensors],
            "dtypes": [tensor.dtype for tensor in tensors],
            "shapes": [list(tensor.shape) for tensor in tensors],
            "group_name": group_name,
            "load_format": "flattened_bucket",
            "flush_cache": False,
        }
        self._post("/update_weights_from_distributed", body | _naming(version))

    def end(self) -> None:
        """Close an update."""
        self._post("/end_weight_update")

    def update_from_disk(self, directory: str, version: int) -> None:
        """Load all safetensors files of a directory."""
        body = {"model_path": directory, "load_format": "safetensors", "flush_cache": False} | _naming(version)
        self._post("/update_weights_from_disk", body, self._model_timeout_seconds)

    def hashes(self) -> list[dict[str, Any]]:
        """Of every tensor, rank by rank; see `held_hashes.differences`."""
        body = {"action": "checksum", "selector": "target"}
        ranks: list[dict[str, Any]] = self._post("/weights_checker", body, self._model_timeout_seconds)["ranks"]
        return ranks

    def _post(self, path: str, body: Mapping[str, Any] | None = None, timeout_seconds: float | None = None) -> dict[str, Any]:
        timeout_seconds = timeout_seconds or self._timeout_seconds
        address = urlsplit(self.endpoint.url)
        headers = {"Content-Type": "application/json"}
        if self.endpoint.api_key:
            headers["Authorization"] = f"Bearer {self.endpoint.api_key}"
        connect = HTTPSConnection if address.scheme == "https" else HTTPConnection
        try:
            with closing(connect(address.hostname or "", address.port, timeout=timeout_seconds)) as connection:
                connection.request("POST", address.path + path, json.dumps(body or {}), headers)
                response = connection.getresponse()
                text = response.read().decode(errors="replace")
        except TimeoutError as error:
            raise EngineLostError(
                f"{self.endpoint.name} ({self.endpoint.url}) did not answer {path} within {timeout_seconds:.0f} s",
                self.endpoint.name,
            ) from error
        except (OSError, HTTPException) as error:
            raise EngineLostError(
                f"{self.endpoint.name} ({self.endpoint.url}) is gone: {path} ended with {type(error).__name__} {error}",
                self.endpoint.name,
            ) from error
        if response.status != 200:
            raise ServerRefusedError(
                f"{self.endpoint.name} ({self.endpoint.url}) refused {path} with status {response.status}: {text[:500]}"
            )
        try:
            answer: dict[str, Any] = json.loads(text)
        except ValueError as error:
            raise ServerRefusedError(
                f"{self.endpoint.name} ({self.endpoint.url}) answered {path} with {text[:100]!r}, which is no JSON; is it an SGLang server?"
            ) from error
        return answer


class ServerRefusedError(EngineError):
    """A server is there, and does not do what it is asked."""


def _naming(version: int | None) -> dict[str, str]:
    return {} if version is None else {"weight_version": str(version)}
