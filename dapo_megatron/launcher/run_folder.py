"""The run folder and its checkpoints.

    RUN/config.json                   resolved config, versions, commit
    RUN/metrics.jsonl                 one object per rollout step
    RUN/logs/                         output of every rank and engine
    RUN/checkpoints/step_000050/      complete: it carries the marker COMPLETE, written last
    RUN/checkpoints/step_000050.tmp/  being written, or left by a crash

A checkpoint after N rollout steps is step_N: the next rollout step is N (counting from 0), the weights have version N.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dapo_megatron.types import CheckpointError

MARKER = "COMPLETE"
_NAME = re.compile(r"step_(\d{6,})")


class RunFolder:
    """Paths of a run, and its checkpoints."""

    def __init__(self, path: Path):
        self.path = path
        self.metrics_file = path / "metrics.jsonl"
        self.config_file = path / "config.json"
        self.logs = path / "logs"
        self.checkpoints = path / "checkpoints"
        self.tensorboard = path / "tensorboard"

    def create(self, description: dict[str, Any]) -> None:
        """Make the folders and write config.json."""
        for folder in (self.logs, self.checkpoints):
            folder.mkdir(parents=True, exist_ok=True)
        _write_durably(self.config_file, json.dumps(description, indent=2) + "\n")

    def complete_checkpoints(self) -> list[Path]:
        """Usable checkpoints, oldest first."""
        found = [path for path in self.checkpoints.glob("step_*") if _NAME.fullmatch(path.name) and (path / MARKER).is_file()]
        return sorted(found, key=num_steps_of)

    def newest_checkpoint(self) -> Path | None:
        """The newest usable checkpoint."""
        complete = self.complete_checkpoints()
        return complete[-1] if complete else None

    @contextmanager
    def writing_checkpoint(self, num_steps: int) -> Iterator[Path]:
        """A directory to fill; on leaving without an error it gets its marker and its final name."""
        final = self.checkpoints / f"step_{num_steps:06d}"
        temporary = final.with_name(final.name + ".tmp")
        for leftover in (temporary, final):
            if leftover.exists():
                shutil.rmtree(leftover)
        temporary.mkdir(parents=True)
        yield temporary
        files = {str(file.relative_to(temporary)): file.stat().st_size for file in temporary.rglob("*") if file.is_file()}
        _write_durably(temporary / MARKER, json.dumps({"num_steps": num_steps, "files": files}, indent=2) + "\n")
        temporary.rename(final)

    def keep_newest(self, count: int) -> None:
        """Remove older complete checkpoints."""
        for path in self.complete_checkpoints()[:-count]:
            shutil.rmtree(path)


def num_steps_of(checkpoint: Path) -> int:
    """Rollout steps a checkpoint has behind it."""
    match = _NAME.fullmatch(checkpoint.name)
    if match is None:
        raise CheckpointError(f"{checkpoint} is no checkpoint folder; give .../checkpoints/step_NNNNNN")
    return int(match[1])


def require_complete(checkpoint: Path) -> Path:
    """The checkpoint, if all files its marker lists are there with their sizes; otherwise CheckpointError. Never a silent fresh start."""
    marker = checkpoint / MARKER
    if not marker.is_file():
        raise CheckpointError(
            f"{checkpoint} holds no complete checkpoint ({MARKER} is missing); give .../checkpoints/step_NNNNNN"
        )
    for name, size in json.loads(marker.read_text())["files"].items():
        file = checkpoint / name
        if not file.is_file() or file.stat().st_size != size:
            raise CheckpointError(
                f"{file} should have {size} bytes; the checkpoint is damaged, remove {checkpoint} to use an older one"
            )
    return checkpoint


def size_bytes(checkpoint: Path) -> int:
    """Bytes of all files."""
    return sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())


def _write_durably(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".new")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
