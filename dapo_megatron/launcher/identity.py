"""What a run's future depends on besides its checkpoint: settings, data, code, package versions. Compared before a run goes on."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import xxhash

from dapo_megatron.config.load import resolved_dict
from dapo_megatron.config.schema import Config
from dapo_megatron.types import ConfigError

PACKAGES = ("torch", "megatron-core", "transformer-engine", "transformers", "sglang", "numpy", "math-verify")
"""Packages that numbers depend on."""
FREE = (
    *("run.dir", "run.max_restarts", "run.prepare", "model.path", "data.path"),
    *("train.num_rollout_steps", "train.stop_at_accuracy", "train.record_batch_of_step"),
    *("eval", "checkpoint", "metrics", "cluster", "slurm", "actor.offload"),
)
"""Settings that do not shape the numbers of training: paths are compared by what they hold."""


@dataclass(frozen=True, slots=True)
class RunIdentity:
    """Everything by name, as text: config paths, `data`, `model`, `code`, `code.reward`, `versions.PACKAGE`."""

    items: dict[str, str]


@dataclass(frozen=True, slots=True)
class Difference:
    """One name whose value is not what it was."""

    name: str
    before: str
    now: str


def identity_of(config: Config, data_fingerprint: str) -> RunIdentity:
    """Of a run about to start; `data_fingerprint` is that of the training prompts."""
    items = {name: str(value) for name, value in _leaves(resolved_dict(config)) if not _is_below(name, FREE)}
    items["data"] = data_fingerprint
    items["model"] = digest_of_model(config.model.path)
    items["code"] = _digest(sorted(Path(__file__).resolve().parents[1].rglob("*.py")))
    if config.reward.function is not None:
        items["code.reward"] = _digest_of_module(config.reward.function.partition(":")[0])
    items |= {f"versions.{package}": installed_version(package) or "not installed" for package in PACKAGES}
    return RunIdentity(items)


def digest_of_model(hf_dir: Path) -> str:
    """What a run keeps of its model: changes when config.json does."""
    return _digest([hf_dir / "config.json"])


def differences(before: RunIdentity, now: RunIdentity, allowed: Sequence[str]) -> list[Difference]:
    """What changed and is not allowed to, by name; a name allows all names below it."""
    names = sorted(before.items.keys() | now.items.keys())
    return [
        Difference(name, before.items.get(name, "absent"), now.items.get(name, "absent"))
        for name in names
        if before.items.get(name) != now.items.get(name) and not _is_below(name, allowed)
    ]


def require_same(before: RunIdentity, now: RunIdentity, allowed: Sequence[str], checkpoint: Path) -> None:
    """Raises ConfigError with a sentence for each difference."""
    problems = [
        f"{item.name} is {item.now}, but was {item.before} in {checkpoint}; put it back, or go on all the same with "
        f"--allow-changed {item.name}."
        for item in differences(before, now, allowed)
    ]
    if problems:
        raise ConfigError(problems)


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _is_below(name: str, roots: Sequence[str]) -> bool:
    return any(f"{name}.".startswith(f"{root}.") for root in roots)


def _digest(files: Sequence[Path]) -> str:
    running = xxhash.xxh3_64()
    for file in files:
        running.update(file.name.encode())
        running.update(file.read_bytes())
    return running.hexdigest()


def _digest_of_module(name: str) -> str:
    spec = importlib.util.find_spec(name)
    return _digest([Path(spec.origin)]) if spec is not None and spec.origin is not None else "not found"


def installed_version(package: str) -> str | None:
    """None: not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
