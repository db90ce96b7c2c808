"""How versions are sent to servers, and what came of one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dapo_megatron.types import EngineEndpoint

Transport = Literal["tensor", "distributed", "disk"]


@dataclass(frozen=True, slots=True)
class PushRules:
    """How versions are sent; the same for all of a run."""

    bucket_bytes: int
    dtype: Literal["float32", "bfloat16", "float16"]
    """Of the engines, by its torch name; the ranks cast what they own."""
    directory: Path | None = None
    """For transport disk: a folder that the sender and the servers see."""
    timeout_seconds: float = 60.0
    """Of a call to a server that is about one bucket."""
    model_timeout_seconds: float = 900.0
    """Of a call that is about all of the model: to load it from disk, to hash it."""
    check_hashes: bool = True
    """Compare what the engines hold with what was sent."""
    check_shards: bool = True
    """Compare what was gathered with what the ranks hold (`actor/shard_check.py`)."""
    compare_copies: bool = True
    """In it, compare ranks that hold copies with each other."""


@dataclass(frozen=True, slots=True)
class PushReport:
    """One version, as the assembler saw it."""

    version: int
    num_bytes: int
    """To each server."""
    seconds: float
    """Of all of it."""
    check_seconds: float
    """Of these, after the last byte: until the engines had said what they hold and it was compared."""
    memcpy_seconds: float
    """What a copy of `num_bytes` from host memory to host memory takes; measured when the pusher was made."""
    failures: Mapping[str, str] = field(default_factory=dict)
    """Name of a server that did not get the version -> what happened."""
    shard_check_seconds: float = 0.0
    """Of `seconds`: until what was gathered had been compared with what the ranks hold; 0 when it was not."""

    def metrics(self) -> dict[str, float]:
        """For a metrics row."""
        return {
            "weights/sync_bytes": self.num_bytes,
            "weights/sync_gb_per_second": self.num_bytes / self.seconds / 1e9,
            "weights/sync_to_memcpy_ratio": self.seconds / self.memcpy_seconds,
            "weights/shard_check_seconds": self.shard_check_seconds,
            "weights/check_seconds": self.check_seconds,
            "weights/num_engines_failed": len(self.failures),
        }


def reads_gpu(endpoint: EngineEndpoint, transport: Transport, gpu_id: int | None) -> bool:
    """Whether the server can take weights out of the memory of the sender's GPU: through NCCL, or mapped where it sees this GPU."""
    if endpoint.device != "cuda":
        return False
    return transport == "distributed" or (transport == "tensor" and gpu_id in endpoint.gpu_ids)
