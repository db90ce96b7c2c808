"""The run folder and its checkpoints.

    RUN/config.json                   resolved config, versions, commit
    RUN/metrics.jsonl                 one object per rollout step
    RUN/phase.json                    what the run is doing: rollout step, phase, since when
    RUN/phase_times.json              how long phases took: deadlines are learnt from it (phase_history.py)
    RUN/logs/                         output of every rank and engine
    RUN/checkpoints/step_000050/      complete: it carries the marker COMPLETE, written last
    RUN/checkpoints/step_000050.tmp/  being written, or left by a crash

A checkpoint after N rollout steps is step_N: the next rollout step is N (counting from 0), the weights have version N.
The marker lists size and hash of every file. An older checkpoint may be kept with its weights alone: its marker says so.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from dapo_megatron.metrics.writers import FILE_NAME as METRICS_FILE_NAME
from dapo_megatron.types import CheckpointError
from dapo_megatron.weights.file_digest import FileDigest, digest_file
from dapo_megatron.whole_files import write_whole

MARKER = "COMPLETE"
ACTOR = "actor"
"""The part of a checkpoint that the actor ranks write."""
WEIGHTS = f"{ACTOR}/weights/"
"""What stays of a checkpoint that is kept for its weights."""
_NAME = re.compile(r"step_(\d{6,})")


@dataclass(frozen=True, slots=True)
class Marker:
    """Content of the marker: `files` maps relative names to digests."""

    num_steps: int
    files: dict[str, FileDigest]
    weights_only: bool = False


@dataclass(frozen=True, slots=True)
class PhaseNote:
    """Content of phase.json. Rollout steps count from 1 as in metrics.jsonl; times are seconds since 1970."""

    rollout_step: int
    phase: str
    since: float
    attempt_started: float
    """Of the attempt under way: a run that starts again after a death has a new one."""


_MARKER = TypeAdapter(Marker)
_PHASE = TypeAdapter(PhaseNote)


class RunFolder:
    """Paths of a run, and its checkpoints."""

    def __init__(self, path: Path):
        self.path = path
        self.metrics_file = path / METRICS_FILE_NAME
        self.config_file = path / "config.json"
        self.phase_file = path / "phase.json"
        self.phase_times_file = path / "phase_times.json"
        self.logs = path / "logs"
        self.checkpoints = path / "checkpoints"
        self.tensorboard = path / "tensorboard"

    def create(self, description: dict[str, Any]) -> None:
        """Make the folders and write config.json."""
        for folder in (self.logs, self.checkpoints):
            folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.config_file, json.dumps(description, indent=2) + "\n", durable=True)

    def note_phase(self, note: PhaseNote) -> None:
        """Say what the run is doing now."""
        write_whole(self.phase_file, _PHASE.dump_json(note) + b"\n")

    def complete_checkpoints(self) -> list[Path]:
        """Checkpoints that a run can go on from, oldest first."""
        return [path for path in self._marked() if not read_marker(path).weights_only]

    def newest_checkpoint(self) -> Path | None:
        """The newest checkpoint that a run can go on from."""
        complete = self.complete_checkpoints()
        return complete[-1] if complete else None

    def unfinished_checkpoint(self, num_steps: int) -> Path:
        """Where a checkpoint is while it is written."""
        return self.checkpoints / f"step_{num_steps:06d}.tmp"

    def begin_checkpoint(self, num_steps: int) -> Path:
        """An empty directory to fill; `complete_checkpoint` gives it its marker and its final name. Raises OSError."""
        for leftover in self.checkpoints.glob("step_*.tmp"):  # of a crash: one save is in flight at a time
            shutil.rmtree(leftover)
        directory = self.unfinished_checkpoint(num_steps)
        directory.mkdir(parents=True)
        return directory

    def complete_checkpoint(self, directory: Path, digests: Mapping[str, FileDigest]) -> Path:
        """Seal what `begin_checkpoint` gave; files without a digest are read for theirs. Raises OSError."""
        files = {str(file.relative_to(directory)): file for file in sorted(directory.rglob("*")) if file.is_file()}
        if absent := sorted(set(digests) - set(files)):
            raise OSError(f"{directory / absent[0]} was written but is not there")
        final = directory.with_suffix("")
        listed = {name: digests.get(name) or digest_file(file) for name, file in files.items()}
        _write_marker(directory, Marker(num_steps_of(final), listed))
        if final.exists():
            shutil.rmtree(final)
        directory.rename(final)
        _sync_directory(self.checkpoints)
        return final

    def prune(self, keep_last: int, keep_every: int | None) -> None:
        """Remove all but the last complete checkpoints; of every `keep_every`-th step the weights stay."""
        for path in self.complete_checkpoints()[:-keep_last]:
            if keep_every is not None and num_steps_of(path) % keep_every == 0:
                _strip(path)
            else:
                shutil.rmtree(path)

    def _marked(self) -> list[Path]:
        found = [path for path in self.checkpoints.glob("step_*") if _NAME.fullmatch(path.name) and (path / MARKER).is_file()]
        return sorted(found, key=num_steps_of)


def read_phase(phase_file: Path) -> PhaseNote:
    """What the run was doing when it last said so. FileNotFoundError before it has."""
    return _PHASE.validate_json(phase_file.read_bytes())


def read_marker(checkpoint: Path) -> Marker:
    """What the checkpoint says of itself; CheckpointError when it has no marker or a damaged one."""
    try:
        return _MARKER.validate_json((checkpoint / MARKER).read_bytes())
    except FileNotFoundError:
        raise CheckpointError(
            f"{checkpoint} holds no complete checkpoint ({MARKER} is missing); give .../checkpoints/step_NNNNNN"
        ) from None
    except ValidationError as error:
        raise CheckpointError(f"{checkpoint / MARKER} is damaged ({error.errors()[0]['msg']}); use another checkpoint") from None


def num_steps_of(checkpoint: Path) -> int:
    """Rollout steps a checkpoint has behind it."""
    match = _NAME.fullmatch(checkpoint.name)
    if match is None:
        raise CheckpointError(f"{checkpoint} is no checkpoint folder; give .../checkpoints/step_NNNNNN")
    return int(match[1])


def require_complete(checkpoint: Path) -> Path:
    """The checkpoint, if all files its marker lists are there with their sizes; otherwise CheckpointError. Never a silent fresh start.

    Hashes are compared when the files are read: `ActorWorker.load` for those of the ranks.
    """
    for name, digest in read_marker(checkpoint).files.items():
        file = checkpoint / name
        if not file.is_file() or file.stat().st_size != digest.num_bytes:
            raise CheckpointError(
                f"{file} should have {digest.num_bytes} bytes; the checkpoint is damaged, remove {checkpoint} to use an older one"
            )
    return checkpoint


def actor_digests(checkpoint: Path, *, weights_only: bool = False) -> dict[str, FileDigest]:
    """Of the files that the actor ranks wrote, or of the weights alone, by name below `checkpoint`/actor."""
    root = WEIGHTS if weights_only else f"{ACTOR}/"
    files = read_marker(checkpoint).files.items()
    return {name.removeprefix(f"{ACTOR}/"): digest for name, digest in files if name.startswith(root)}


def _strip(checkpoint: Path) -> None:
    """Leave the weights: the marker changes first, so that a crash in between leaves no checkpoint that looks whole."""
    marker = read_marker(checkpoint)
    kept = {name: digest for name, digest in marker.files.items() if name.startswith(WEIGHTS)}
    _write_marker(checkpoint, Marker(marker.num_steps, kept, weights_only=True))
    for name in marker.files.keys() - kept.keys():
        (checkpoint / name).unlink(missing_ok=True)
    for folder in sorted((path for path in checkpoint.rglob("*") if path.is_dir()), reverse=True):
        if not any(folder.iterdir()):
            folder.rmdir()


def _write_marker(directory: Path, marker: Marker) -> None:
    write_whole(directory / MARKER, _MARKER.dump_json(marker, indent=2) + b"\n", durable=True)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
