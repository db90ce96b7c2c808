"""Pickles of objects whose classes are not imported: torch's, in half a second less than it takes to import torch.

Python values stand for themselves; `Name` is a class or function by name, `Call` the result of calling it, `Instance` an object of a
class with its attributes or other state. Protocol 2, as in archives of torch.save.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Name:
    """`module.name`."""

    module: str
    name: str


@dataclass(frozen=True, slots=True)
class Call:
    """What `function(*arguments)` gives when it is unpickled."""

    function: Name
    arguments: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Instance:
    """An object made without its `__init__`, then given `state`: a dict of attributes, or what its `__setstate__` takes."""

    cls: Name
    state: Any


@dataclass(frozen=True, slots=True)
class External:
    """A value that the reader finds by this key, as torch does for the storage of a tensor."""

    key: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Pairs:
    """A dict whose keys are of these kinds too."""

    items: tuple[tuple[Any, Any], ...]


def pickled(value: Any) -> bytes:
    """The whole pickle."""
    return b"\x80\x02" + _ops(value) + b"."


def _ops(value: Any) -> bytes:
    """The opcodes that push a value."""
    match value:
        case Name(module, name):
            return f"c{module}\n{name}\n".encode()
        case Call(function, arguments):
            return _ops(function) + _ops(arguments) + b"R"
        case Instance(cls, state):
            return _ops(cls) + b")\x81" + _ops(state) + b"b"
        case External(key):
            return _ops(key) + b"Q"
        case tuple():
            return b"(" + b"".join(map(_ops, value)) + b"t"
        case list():
            return b"](" + b"".join(map(_ops, value)) + b"e"
        case Pairs(items):
            return b"}(" + b"".join(_ops(key) + _ops(item) for key, item in items) + b"u"
        case dict():
            return _ops(Pairs(tuple(value.items())))
        case None | bool() | int() | float() | str():
            return pickle.dumps(value, protocol=2)[2:-1]
    raise TypeError(f"{value!r} cannot be written; it must be one of the kinds above")
