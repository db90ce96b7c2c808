"""What Slurm reads as text: times, and values that stand in one line of a batch script."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, PositiveInt
from pydantic_core import PydanticCustomError

_TIME = re.compile(
    r"(?P<days>\d+)-(?P<hours>\d+)(:(?P<minutes>\d+)(:(?P<seconds>\d+))?)?"
    r"|(?P<h>\d+):(?P<m>\d+):(?P<s>\d+)|(?P<only_minutes>\d+)(:(?P<and_seconds>\d+))?"
)
_UNLIMITED = ("UNLIMITED", "INFINITE")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def seconds_of(time: str | int) -> int | None:
    """Seconds of a Slurm time: minutes, `M:SS`, `H:MM:SS`, `D-H`, `D-H:MM`, `D-H:MM:SS`. None: unlimited. ValueError for others."""
    if str(time) in _UNLIMITED:
        return None
    match = _TIME.fullmatch(str(time))
    if match is None:
        raise ValueError(f"{time} is no time")
    part = {name: int(digits) for name, digits in match.groupdict().items() if digits is not None}
    hours = part.get("hours", 0) + part.get("h", 0) + 24 * part.get("days", 0)
    minutes = part.get("minutes", 0) + part.get("m", 0) + part.get("only_minutes", 0)
    return 3600 * hours + 60 * minutes + part.get("seconds", 0) + part.get("s", 0) + part.get("and_seconds", 0)


def _time(text: str) -> str:
    try:
        usable = bool(seconds_of(text))
    except ValueError:
        usable = False
    if not usable:
        raise PydanticCustomError("slurm_time", "must be a time")
    return text


def _line(text: str) -> str:
    if not text or not text.isprintable():
        raise PydanticCustomError("one_line", "must be one line of text")
    return text


def _names(values: dict[str, str]) -> dict[str, str]:
    if not all(_NAME.fullmatch(name) for name in values) or any("\0" in value for value in values.values()):
        raise PydanticCustomError("environment", "must be names and values")
    return values


SlurmTime = PositiveInt | Annotated[str, AfterValidator(_time)]
"""Minutes, or text such as 24:00:00."""
Line = Annotated[str, AfterValidator(_line)]
"""Text without line breaks and other control characters: an option in a batch script cannot hold them."""
Environment = Annotated[dict[str, str], AfterValidator(_names)]
"""Values of any text, by names that a shell can export."""

RULES = {
    "slurm_time": "be a time as Slurm writes it, e.g. 24:00:00 or 2-12:00:00",
    "one_line": "be one line of text, without control characters",
    "environment": "be names made of letters, digits and _, with values of text",
}
"""What a value must do, by type of error."""
