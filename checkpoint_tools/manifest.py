"""What lies beside an output: the hash of every tensor, and where it all came from."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from dapo_megatron.types import CheckpointError

MANIFEST_FILE, PROVENANCE_FILE = "manifest.json", "provenance.json"
TRACKER_FILE = "latest_checkpointed_iteration.txt"
"""Megatron-LM's: which iteration in this folder to load."""
RELEASE = "release"
"""The iteration of weights that come without optimizer and random streams: Megatron-LM starts at 0 from them."""


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """One HF tensor: `dtype` as safetensors writes it, `xxh3` is xxh3_128 of its row-major bytes in hex."""

    shape: tuple[int, ...]
    dtype: str
    xxh3: str


@dataclass(frozen=True)
class Manifest:
    """The HF tensors that an output holds, in whatever layout, and those of the source that it leaves out, with the reason."""

    tensors: Mapping[str, TensorRecord]
    skipped: Mapping[str, str] = field(default_factory=dict)

    def fingerprint(self) -> str:
        """xxh3_128 over names, shapes, dtypes and hashes: equal for equal models."""
        lines = [f"{name} {list(r.shape)} {r.dtype} {r.xxh3}\n" for name, r in sorted(self.tensors.items())]
        return xxhash.xxh3_128_hexdigest("".join(lines).encode())

    def write(self, directory: Path) -> None:
        """As manifest.json."""
        text = {
            "fingerprint": self.fingerprint(),
            "skipped": dict(self.skipped),
            "tensors": {name: asdict(record) for name, record in self.tensors.items()},
        }
        (directory / MANIFEST_FILE).write_text(json.dumps(text, indent=1) + "\n")

    @classmethod
    def read(cls, directory: Path) -> Manifest | None:
        """None where there is none; CheckpointError for a damaged one."""
        path = directory / MANIFEST_FILE
        if not path.is_file():
            return None
        try:
            value = json.loads(path.read_text())
            tensors = {
                name: TensorRecord(tuple(record["shape"]), record["dtype"], record["xxh3"])
                for name, record in value["tensors"].items()
            }
            manifest = cls(tensors, value["skipped"])
            if manifest.fingerprint() != value["fingerprint"]:
                raise CheckpointError(f"{path} does not have its own fingerprint: it was changed; convert again")
            return manifest
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} is damaged ({error!r}); convert again") from error


def write_provenance(directory: Path, **facts: Any) -> None:
    """As provenance.json: tool version and command line, then the given facts (JSON)."""
    from importlib.metadata import version

    text = {"tool": f"dapo-megatron {version('dapo-megatron')}", "command": ["checkpoint-tools", *sys.argv[1:]], **facts}
    (directory / PROVENANCE_FILE).write_text(json.dumps(text, indent=1) + "\n")


def source_files(files: list[Path], folder: Path) -> list[dict[str, Any]]:
    """Name in `folder`, size and time of change of source files: who a source is, without reading it."""
    return [
        {"name": str(file.relative_to(folder)), "num_bytes": file.stat().st_size, "mtime_ns": file.stat().st_mtime_ns}
        for file in files
    ]
