"""The schema as a flat list of documented fields: what overrides may name, and what `dapo-megatron config` prints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo

from dapo_megatron.config.schema import Config, Section

_TYPE_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "integer",
    float: "number",
    str: "text",
    Path: "path",
    NoneType: "null",
    Any: "anything",
}


@dataclass(frozen=True, slots=True)
class ConfigField:
    """One leaf of the schema. `path` is dotted; `type` is in words, with the range; `default` is None when `required`."""

    path: str
    type: str
    default: Any
    required: bool
    meaning: str
    takes_any_key: bool
    """The value is a free mapping: paths below it are accepted as they are."""

    @property
    def name(self) -> str:
        """Last part of the path."""
        return self.path.rpartition(".")[2]


@cache
def config_fields() -> tuple[ConfigField, ...]:
    """Every leaf of `Config`, in the order of the schema."""
    return tuple(_fields_of(Config, ""))


@cache
def section_paths() -> frozenset[str]:
    """Dotted paths of all sections, e.g. `actor` and `actor.optimizer`."""
    parts = (field.path.split(".")[:-1] for field in config_fields())
    return frozenset(".".join(part[:depth]) for part in parts for depth in range(1, len(part) + 1))


def nearest(name: str, choices: Iterable[str], limit: int = 3) -> list[str]:
    """The choices spelled most like `name`, best first; empty when none is close."""
    return get_close_matches(name, list(choices), n=limit, cutoff=0.6)


def did_you_mean(names: Iterable[str]) -> str:
    """`; did you mean a, b or c?`, or the empty string for no names."""
    listed = either(names)
    return f"; did you mean {listed}?" if listed else ""


def either(names: Iterable[object]) -> str:
    """`a, b or c`."""
    *rest, last = [str(name) for name in names] or [""]
    return f"{', '.join(rest)} or {last}" if rest else last


def _fields_of(section: type[Section], prefix: str) -> Iterator[ConfigField]:
    for name, info in section.model_fields.items():
        path = prefix + name
        sections = _sections_in(info.annotation)
        if sections:
            yield from _distinct(field for inner in sections for field in _fields_of(inner, path + "."))
            continue
        yield ConfigField(
            path=path,
            type=_with_range(_type_words(info.annotation), info.metadata),
            default=None if info.is_required() else info.get_default(),
            required=info.is_required(),
            meaning=_meaning(info),
            takes_any_key=get_origin(info.annotation) is dict,
        )


def _sections_in(annotation: Any) -> list[type[Section]]:
    """The section classes an annotation allows: one, or several for a union told apart by `type`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for inner in get_args(annotation) for section in _sections_in(inner)]


def _distinct(fields: Iterable[ConfigField]) -> Iterator[ConfigField]:
    seen: set[str] = set()
    for field in fields:
        if field.path not in seen:
            seen.add(field.path)
            yield field


def _meaning(info: FieldInfo) -> str:
    return " ".join((info.description or "").split())


def _type_words(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _with_range(_type_words(arguments[0]), arguments[1:])
    if origin in (Union, UnionType):
        return " | ".join(_type_words(argument) for argument in arguments)
    if origin is Literal:
        return " | ".join(str(argument) for argument in arguments)
    if origin is dict:
        return "mapping"
    if origin is tuple:
        return f"list of {_type_words(arguments[0])}"
    return _TYPE_WORDS[annotation]


def _with_range(words: str, metadata: Iterable[Any]) -> str:
    rules = []
    for item in metadata:
        match item:
            case annotated_types.Gt(gt=bound):
                rules.append(f"> {bound}")
            case annotated_types.Ge(ge=bound):
                rules.append(f">= {bound}")
            case annotated_types.Lt(lt=bound):
                rules.append(f"< {bound}")
            case annotated_types.Le(le=bound):
                rules.append(f"<= {bound}")
    head, separator, tail = words.partition(" | ")
    return " ".join(filter(None, (head, " and ".join(rules)))) + separator + tail
