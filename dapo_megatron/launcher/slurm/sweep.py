"""An array of runs: `--array actor.optimizer.lr=1e-6,2e-6`; several of them give every combination."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from dapo_megatron.config.load import parse_yaml
from dapo_megatron.types import ConfigError


@dataclass(frozen=True, slots=True)
class Element:
    """One run of the array: the folder it gets below the sweep's, and what differs from the others."""

    name: str
    overrides: tuple[str, ...]


def elements_of(arrays: Sequence[str]) -> tuple[Element, ...]:
    """Every combination of the values; values are YAML between commas. ConfigError names what cannot be read."""
    if not arrays:
        return ()
    axes = [_axis(text) for text in arrays]
    found = [_element(combination) for combination in itertools.product(*axes)]
    names = [element.name for element in found]
    if len(set(names)) < len(names):
        found = [Element(f"{index}_{element.name}", element.overrides) for index, element in enumerate(found)]
    return tuple(found)


def _axis(text: str) -> list[tuple[str, object]]:
    key, equals, values = text.partition("=")
    if not equals or not key.strip("-"):
        raise ConfigError(f"--array {text} must be PATH=VALUE,VALUE,...; write e.g. --array actor.optimizer.lr=1e-6,2e-6.")
    listed = parse_yaml(f"[{values}]", f"--array {key}")
    if not listed:
        raise ConfigError(f"--array {key} has no values; write --array {key}=VALUE,VALUE.")
    return [(key.strip("-"), value) for value in listed]


def _element(combination: Sequence[tuple[str, object]]) -> Element:
    name = ",".join(f"{key.rpartition('.')[2]}={_as_name(value)}" for key, value in combination)
    return Element(name, tuple(f"--{key}={json.dumps(value)}" for key, value in combination))


def _as_name(value: object) -> str:
    """The value in letters that no shell, file system or Slurm minds."""
    text = value if isinstance(value, str) else json.dumps(value)
    return re.sub(r"[^A-Za-z0-9_.+-]+", "_", text)[:60]
