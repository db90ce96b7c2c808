"""What `dapo-megatron evaluate` is pointed at: a run, one of its checkpoints, or an HF directory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from dapo_megatron.launcher.run_folder import ACTOR, RunFolder, actor_digests, num_steps_of, require_complete
from dapo_megatron.types import CheckpointError
from dapo_megatron.weights.file_digest import FileDigest

_HASHED_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class PolicySource:
    """A policy: the weights at `path`, which are version `weight_version`."""

    path: Path
    """Checkpoint folder or HF directory."""
    run: RunFolder | None
    """The run that the checkpoint belongs to; None for an HF directory, whose weights (version 0) the engines read themselves."""
    weight_version: int

    def base_config(self) -> dict[str, Any]:
        """The settings below all config files: those the run was started with, or the HF directory as model."""
        if self.run is None:
            return {"model": {"path": str(self.path)}, "data": {"path": "unused"}}
        return json.loads(self.run.config_file.read_text())["config"]

    def default_out(self, data: str) -> Path:
        """Where an evaluation on `data` goes: next to the run's checkpoints, or below the working directory."""
        parent = Path() if self.run is None else self.run.path
        return parent / "evaluations" / f"{self.path.name}_{Path(data).stem}"

    def fingerprint(self) -> str:
        """Changes when the weights do, in hexadecimal: the hashes in a checkpoint's marker; of an HF directory its config, and name, size
        and both ends of each weight file.
        """
        if self.run is None:
            return _digest_of_ends([self.path / "config.json", *sorted(self.path.glob("*.safetensors"))])
        lines = [f"{name} {digest.num_bytes} {digest.xxh3}\n" for name, digest in sorted(self.weight_digests().items())]
        return xxhash.xxh3_128("".join(lines).encode()).hexdigest()

    def actor_directory(self) -> Path:
        """The part of the checkpoint that actor ranks read, as an absolute path."""
        return (self.path / ACTOR).absolute()

    def weight_digests(self) -> dict[str, FileDigest]:
        """Of the checkpoint's weight files, by their name below `actor_directory`."""
        return actor_digests(self.path, weights_only=True)


def find_policy(path: Path) -> PolicySource:
    """Tell the three kinds apart. Raises CheckpointError when `path` is none of them, or has no complete checkpoint."""
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give a run folder, RUN/checkpoints/step_NNNNNN, or an HF model directory.")
    if path.name.startswith("step_") and path.parent.name == "checkpoints":
        return _checkpoint(path)
    description = _json_object(path / "config.json")
    if "model_type" in description:
        return PolicySource(path, None, 0)
    if "config" in description:
        newest = RunFolder(path).newest_checkpoint()
        if newest is None:
            model = description["config"]["model"]["path"]
            raise CheckpointError(
                f"{path} holds no complete checkpoint; train until one is saved (checkpoint.every), or evaluate {model}."
            )
        return _checkpoint(newest)
    raise CheckpointError(
        f"{path} is neither a run folder nor an HF directory: its config.json is missing or of something else; "
        "give a run folder, RUN/checkpoints/step_NNNNNN, or an HF model directory."
    )


def _checkpoint(path: Path) -> PolicySource:
    require_complete(path)
    run = RunFolder(path.parent.parent)
    if "config" not in _json_object(run.config_file):
        raise CheckpointError(f"{path} needs the settings of its run, {run.config_file}; keep the checkpoint in its run folder.")
    return PolicySource(path, run, num_steps_of(path))


def _json_object(file: Path) -> dict[str, Any]:
    """Its content; empty when there is no such file or it is no JSON object."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _digest_of_ends(files: Sequence[Path]) -> str:
    running = xxhash.xxh3_128()
    for path in files:
        size = path.stat().st_size
        running.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            running.update(file.read(_HASHED_BYTES))
            file.seek(max(0, size - _HASHED_BYTES))
            running.update(file.read())
    return running.hexdigest()
