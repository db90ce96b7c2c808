"""What a model family is: a table, what to know about its config.json, and the config in Megatron's words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dapo_megatron.types import MappingError

Config = Mapping[str, Any]
"""A config.json, defaults filled in."""
Arguments = dict[str, Any]
"""Megatron-LM argument name -> value; only what JSON can hold."""


def _nothing(_: Config) -> dict[str, Any]:
    return {}


@dataclass(frozen=True, slots=True)
class Family:
    """One HF model type. To add one: docs/families.md."""

    model_type: str
    table: str
    """Lines of the mapping language, `layout.py`."""
    sizes: Callable[[Config], dict[str, int]]
    """The numbers behind the table's symbols and index letters; a letter runs from 0 to its number."""
    arguments: Callable[[Config], Arguments]
    """The config map: this model as Megatron-LM's arguments."""
    defaults: Mapping[str, Any]
    """HF config fields that may be missing or null, and the value transformers assumes. None: derived from other fields."""
    must_be_off: tuple[str, ...] = ()
    """Boolean HF config fields that add tensors the table does not have."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Ending of another megatron-core name for a tensor -> ending used in the table."""
    layers: Callable[[Config], Mapping[str, Sequence[int]]] = _nothing
    """Index letters that stand for some of the layers -> their numbers."""
    skipped: Callable[[Config], Mapping[str, str]] = _nothing
    """Pattern of HF names that the files may hold and nobody loads -> why."""
    renamed_fields: Mapping[str, str] = field(default_factory=dict)
    """Another name of an HF config field -> the name used here."""


def positive(config: Config, name: str) -> int:
    """A size out of config.json. MappingError when it is no positive integer."""
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise MappingError(f"{name} ({value!r}) must be a positive integer; set it in config.json")
    return value
