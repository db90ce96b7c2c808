"""Values in a batch script: text that a shell, or sbatch, reads back as it was. Nothing else can get into a script.

A template renders through `environment`, where an expression must give a number or come out of one of the filters

    {{ value | word }}       one word of the shell
    {{ value | option }}     a value in an #SBATCH line
    {{ value | options }}    several words there: `--constraint="a b" --nice`
    {{ value | raw }}        shell that the user wrote as shell

and everything else, an undefined name included, is an error.
"""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

_PLAIN_OPTION = re.compile(r"[\w@%+=:,./*\[\]-]*", re.ASCII)


class Quoted(str):
    """Text that may stand in a script."""


def word(value: str | Path) -> Quoted:
    """One word of bash, on one line whatever is in it. ValueError for a NUL, which no word can hold."""
    text = str(value)
    if "\0" in text:
        raise ValueError(f"{text!r} holds a NUL character; remove it")
    if text.isprintable():
        return Quoted(shlex.quote(text))
    escaped = "".join(
        chr(byte) if 32 <= byte < 127 and chr(byte) not in "'\\" else f"\\x{byte:02x}" for byte in os.fsencode(text)
    )
    return Quoted(f"$'{escaped}'")


def option(value: str | int) -> Quoted:
    """A value in an #SBATCH line. ValueError for what such a line cannot hold: line breaks and other control characters."""
    text = str(value)
    if not text.isprintable():
        raise ValueError(f"{text!r} cannot stand in an #SBATCH line; use one line of text")
    if _PLAIN_OPTION.fullmatch(text):
        return Quoted(text)
    return Quoted('"' + re.sub(r"""(["'\\#])""", r"\\\1", text) + '"')


def options(value: str) -> Quoted:
    """Words as a shell would split them, each quoted for an #SBATCH line. ValueError when a quotation is not closed."""
    return Quoted(" ".join(_name_and_value(part) for part in shlex.split(value)))


def environment(folder: Path) -> Environment:
    """Jinja2 over the templates in `folder`."""
    made = Environment(
        loader=FileSystemLoader(folder),
        undefined=StrictUndefined,
        finalize=_only_quoted,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # the filters quote, `_only_quoted` sees to it
    )
    made.filters |= {"word": word, "option": option, "options": options, "raw": Quoted}
    return made


def _name_and_value(part: str) -> str:
    """`--name="a b"`: sbatch takes quotes around a value, not around an option."""
    name, equals, value = part.partition("=")
    return f"{name}={option(value)}" if equals and part.startswith("--") else option(part)


def _only_quoted(value: Any) -> Any:
    if isinstance(value, Quoted) or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    if isinstance(value, StrictUndefined):
        return value  # its own error says which name
    raise TypeError(f"the template writes {value!r} unquoted; add one of the filters word, option, options, raw")
