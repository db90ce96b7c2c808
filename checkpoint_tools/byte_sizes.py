"""Numbers, as people write and read them."""

from __future__ import annotations

import re

from dapo_megatron.types import ConfigError

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{letter}{ending}": 1000**power for power, letter in enumerate("KMGT", start=1) for ending in ("", "B")}
_UNITS |= {f"{letter}IB": 1024**power for power, letter in enumerate("KMGT", start=1)}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")


def parse_bytes(text: str) -> int:
    """`8GiB` (1024) or `5GB` (1000) as a number of bytes. ConfigError for anything else."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or match[2].upper() not in _UNITS:
        raise ConfigError([f"{text!r} must be a number of bytes such as 8GiB, 512MiB or 5GB"])
    return int(float(match[1]) * _UNITS[match[2].upper()])


def parse_counts(text: str) -> tuple[int, ...]:
    """`7,9,9,7`. ConfigError for anything else."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ConfigError([f"{text!r} must be numbers with commas between, such as 7,9,9,7"])
    return tuple(map(int, parts))


def format_bytes(count: float) -> str:
    """Three digits and a decimal unit: 15.2 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def count(number: int, noun: str) -> str:
    """1 file, 2 files."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
