"""Which columns of a row hold the problem and its answer, and what makes a row malformed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from dapo_megatron.config.schema import DataConfig
from dapo_megatron.data.sources import Row
from dapo_megatron.types import DataError

PROMPT_FIELDS = ("prompt", "problem", "question")
ANSWER_FIELDS = ("reward_model.ground_truth", "answer")

Messages = tuple[tuple[str, str], ...]
"""Chat messages as (role, content) pairs."""

_THOUSANDS_COMMA = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_MISSING = object()


class MalformedRowError(Exception):
    """The row cannot be used; the message says why, without the place."""


class ColumnReader:
    """Takes problem and answer out of rows, by configured columns or by the first known ones that a row holds.

    A detected column stays for all later rows.
    """

    def __init__(self, config: DataConfig):
        self._prompt_field = config.prompt_field
        self._answer_field = config.answer_field
        self._answer_pattern = _compile_answer_pattern(config.answer_pattern)

    def read(self, row: Row) -> tuple[str | Messages, str]:
        """Problem (text or messages) and answer. Raises MalformedRowError."""
        if row.fault is not None:
            raise MalformedRowError(row.fault)
        self._prompt_field = self._prompt_field or _detect(row.columns, PROMPT_FIELDS, "data.prompt_field")
        self._answer_field = self._answer_field or _detect(row.columns, ANSWER_FIELDS, "data.answer_field")
        problem = _as_problem(_look_up(row.columns, self._prompt_field), self._prompt_field)
        return problem, self._as_answer(_look_up(row.columns, self._answer_field), self._answer_field)

    def _as_answer(self, value: Any, field: str) -> str:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise MalformedRowError(f"column {field} holds {_shorten(value)}, which is neither text nor a number")
        answer = str(value).strip()
        if self._answer_pattern is not None:
            match = self._answer_pattern.search(answer)
            if match is None:
                raise MalformedRowError(f"data.answer_pattern finds nothing in column {field} ({_shorten(answer)})")
            answer = _THOUSANDS_COMMA.sub("", (match[1] or "").strip())
        if not answer:
            raise MalformedRowError(f"the answer in column {field} is empty")
        return answer


def _compile_answer_pattern(pattern: str | None) -> re.Pattern[str] | None:
    if pattern is None:
        return None
    remedy = r"use a pattern such as `####\s*(\S+)`"
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise DataError(f"data.answer_pattern ({pattern}) is no regular expression ({error}); {remedy}.") from error
    if compiled.groups == 0:
        raise DataError(f"data.answer_pattern ({pattern}) must have a group, which is the answer; {remedy}.")
    return compiled


def _detect(columns: Mapping[str, Any], names: tuple[str, ...], setting: str) -> str:
    for name in names:
        if _descend(columns, name) is not _MISSING:
            return name
    raise MalformedRowError(f"none of the columns {', '.join(names)} among {_names(columns)}; set {setting}")


def _look_up(columns: Mapping[str, Any], field: str) -> Any:
    value = _descend(columns, field)
    if value is _MISSING:
        raise MalformedRowError(f"no column {field} among {_names(columns)}")
    return value


def _descend(columns: Mapping[str, Any], field: str) -> Any:
    """The value at a dotted path; a column whose own name holds the dots goes first."""
    if field in columns:
        return columns[field]
    value: Any = columns
    for key in field.split("."):
        if not isinstance(value, Mapping) or key not in value:
            return _MISSING
        value = value[key]
    return value


def _as_problem(value: Any, field: str) -> str | Messages:
    if isinstance(value, str):
        if not value.strip():
            raise MalformedRowError(f"the problem in column {field} is empty")
        return value
    if not isinstance(value, list) or not value:
        raise MalformedRowError(f"column {field} holds {_shorten(value)}, which is neither text nor chat messages")
    messages = []
    for message in value:
        match message:
            case {"role": str(role), "content": str(content)}:
                messages.append((role, content))
            case _:
                raise MalformedRowError(f"column {field} holds {_shorten(message)}, which has no text role and content")
    return tuple(messages)


def _names(columns: Mapping[str, Any]) -> str:
    return _shorten(list(columns)) if columns else "no columns at all"


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
