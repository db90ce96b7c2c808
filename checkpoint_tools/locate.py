"""What a path given to a command is: an HF directory, a torch_dist checkpoint, a run of dapo-megatron, or legacy Megatron-LM."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from checkpoint_tools.hf_companions import COMPANIONS, CONFIG_FILE, read_hf_config
from checkpoint_tools.manifest import PROVENANCE_FILE, RELEASE, TRACKER_FILE, Manifest
from checkpoint_tools.torch_dist import is_torch_dist
from dapo_megatron.launcher.run_folder import ACTOR, MARKER, RunFolder, num_steps_of, require_complete
from dapo_megatron.types import CheckpointError

Kind = Literal["hf", "torch_dist", "legacy"]
_ITERATION = re.compile(r"iter_(\d+)")
_LEGACY_RANK = re.compile(r"mp_rank_\d+(_\d+)*")


@dataclass(frozen=True, slots=True)
class Place:
    """A checkpoint that was found.

    `root`: the folder that was given or that the files beside the weights are in; `weights`: the folder of the weight files.
    """

    kind: Kind
    root: Path
    weights: Path
    step: int | None
    """Of Megatron-LM's iterations or dapo-megatron's rollout steps; None where the folder's name does not say it."""
    hf_dir: Path | None
    """Where config.json, tokenizer and the like are; None when the checkpoint does not say."""
    lost_hf_dir: str | None = None
    """What the checkpoint says, where there is no such folder: a run may have been moved, or was started elsewhere."""
    sealed: bool = False
    """It has the marker of dapo-megatron, with size and hash of every file."""

    def require(self, *kinds: Kind) -> None:
        """CheckpointError unless it is of one of the kinds."""
        if self.kind not in kinds:
            raise CheckpointError(
                f"{self.root} is {_NAMES[self.kind]}, and must be {' or '.join(_NAMES[k] for k in kinds)}; {_REMEDIES[self.kind]}"
            )

    def manifest(self) -> Manifest | None:
        """What these tools recorded when they wrote it; None for a checkpoint of anybody else, which may lie in the same folder."""
        if self.kind == "hf":
            return Manifest.read(self.root)
        return Manifest.read(self.weights.parent) if self.weights.name == RELEASE else None

    def hf_config(self, hf_dir: Path | None = None) -> dict[str, Any]:
        """The config.json of `hf_dir`, or the one that belongs to the checkpoint. CheckpointError when there is none."""
        directory = hf_dir or self.hf_dir
        if directory is None:
            why = "does not say which model it is" if self.lost_hf_dir is None else f"is of {self.lost_hf_dir}, which is not here"
            raise CheckpointError(f"{self.root} {why}; give the folder of its config.json with --hf-config")
        return read_hf_config(directory)


_NAMES: dict[Kind, str] = {
    "hf": "a Hugging Face directory",
    "torch_dist": "a torch_dist checkpoint",
    "legacy": "a legacy mp_rank_* checkpoint",
}
_REMEDIES: dict[Kind, str] = {
    "hf": "`checkpoint-tools hf-to-megatron` converts it",
    "torch_dist": "`checkpoint-tools megatron-to-hf` converts it",
    "legacy": "`checkpoint-tools megatron-to-hf` converts it, `checkpoint-tools reshard` changes its layout",
}


def locate(path: Path) -> Place:
    """Find the checkpoint at `path`: of a run or a Megatron-LM folder the newest. CheckpointError when there is none."""
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give a checkpoint or a Hugging Face directory")
    if not path.is_dir():
        raise CheckpointError(f"{path} is a file; give the folder it is in")
    if is_torch_dist(path):
        return _torch_dist(path, path)
    if (path / MARKER).is_file() or (path.parent.name == "checkpoints" and path.name.startswith("step_")):
        return _of_run(path)
    if (path / TRACKER_FILE).is_file():
        return _tracked(path)
    if any(_LEGACY_RANK.fullmatch(child.name) for child in path.iterdir()):
        return _legacy(path, path)
    description = _json_object(path / CONFIG_FILE)
    if isinstance(description.get("config"), dict):
        newest = RunFolder(path).newest_checkpoint()
        if newest is None:
            raise CheckpointError(f"{path} holds no complete checkpoint; train until one is saved (checkpoint.every)")
        return _of_run(newest)
    if "model_type" in description or "architectures" in description or any(path.glob("*.safetensors")):
        return Place("hf", path, path, None, path)
    if (path / "weights").is_dir() and is_torch_dist(path / "weights"):
        return _torch_dist(path, path / "weights")
    raise CheckpointError(
        f"{path} is no checkpoint: it has neither config.json nor metadata.json, {TRACKER_FILE} nor mp_rank_*; give the folder of one"
    )


def _torch_dist(root: Path, weights: Path) -> Place:
    return Place("torch_dist", root, weights, _iteration(weights), _companions(root) or _recorded_source(root))


def _legacy(root: Path, weights: Path) -> Place:
    return Place("legacy", root, weights, _iteration(weights), _companions(root))


def _companions(root: Path) -> Path | None:
    return next((folder for folder in (root / COMPANIONS, root.parent / COMPANIONS) if (folder / CONFIG_FILE).is_file()), None)


def _recorded_source(root: Path) -> Path | None:
    for folder in (root, root.parent):
        source = _json_object(folder / PROVENANCE_FILE).get("source")
        if isinstance(source, str) and (Path(source) / CONFIG_FILE).is_file():
            return Path(source)
    return None


def _tracked(path: Path) -> Place:
    text = (path / TRACKER_FILE).read_text().strip()
    name = f"iter_{int(text):07d}" if text.isdecimal() else text
    folder = path / name
    if Path(name).name != name or not folder.is_dir():
        raise CheckpointError(f"{path / TRACKER_FILE} says {text!r}, and {folder} is no folder; give the folder of an iteration")
    if any(_LEGACY_RANK.fullmatch(child.name) for child in folder.iterdir()):
        return _legacy(path, folder)
    place = _torch_dist(path, folder)
    if not is_torch_dist(folder):
        raise CheckpointError(f"{folder} has no metadata.json: the save was not completed; use another checkpoint")
    return place


def _of_run(checkpoint: Path) -> Place:
    require_complete(checkpoint)
    description = _json_object(checkpoint.parent.parent / CONFIG_FILE)
    model = description.get("config", {}).get("model", {}).get("path")
    is_here = isinstance(model, str) and (Path(model) / CONFIG_FILE).is_file()
    return Place(
        kind="torch_dist",
        root=checkpoint,
        weights=checkpoint / ACTOR / "weights",
        step=num_steps_of(checkpoint),
        hf_dir=Path(model) if is_here else None,
        lost_hf_dir=None if is_here else model,
        sealed=True,
    )


def _iteration(folder: Path) -> int | None:
    match = _ITERATION.fullmatch(folder.name)
    return int(match[1]) if match else None


def _json_object(file: Path) -> dict[str, Any]:
    """Its content; empty when there is no such file or it is no JSON object."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
