"""The mapping language: how a megatron-core tensor is laid out of HF tensors.

Every relation between the two is a permutation of whole rows, so it is written as data. A family table (`families/`) has one
line a megatron-core tensor:

    megatron-core name                     HF name(s)                                   layout    [dtype] [condition]

    decoder.final_layernorm.weight         model.norm.weight                            h
    output_layer.weight                    lm_head.weight                               v+pad h   if not tie_word_embeddings
    ...{L}.self_attention.linear_qkv.bias  model.layers.{L}.self_attn.{q,k,v}_proj.bias (g [q:n*d | k:d | v:d])
    ...{L}.mlp.linear_fc1.weight           model.layers.{L}.mlp.{gate,up}_proj.weight   [gate:f | up:f] h

Names
    {L}             one tensor for each L in 0 .. sizes["L"] - 1 (any capital letter, so {E} for experts); in both names. The family
                    may give the values instead: {M} are the layers with experts.
    {q,k,v}         one HF tensor for each part of the layout, in the same order; in the HF name only.

Layout = rows, then for a matrix a space and its columns. Columns are the same on both sides; all algebra is on rows.
    n*d             a size: a product of symbols and integers. The family says what a symbol is (`dense_sizes`).
    rows            the megatron-core tensor is the HF tensor.
    [a:x | b:y]     x rows of HF tensor a, then y rows of b.
    (g [a:x | b:y]) that g times over: repetition i takes the i-th x rows of a and the i-th y rows of b.
    ...+pad         megatron-core may have more rows below, or more columns to the right, all zero: padding of the vocabulary, or
                    of the query groups, to a multiple of the tensor-parallel size.

dtype: `in fp32` where megatron-core keeps the tensor in fp32 whatever the model's dtype.
Condition: `if field` or `if not field`: the tensor exists where the field of the HF config is (not) true or not 0.
Blank lines and lines that start with # are skipped.

`parse_table` reads the text, `compile_layout` turns one layout into runs: rows that lie together on both sides.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from dapo_megatron.types import MappingError

_SIZE = r"[A-Za-z0-9]+(?:\*[A-Za-z0-9]+)*"
_PART = rf"[a-z0-9_]+:{_SIZE}"
_LAYOUT = re.compile(
    rf"(?: (?P<rows>{_SIZE})"
    rf"  | (?: \((?P<repeat>{_SIZE})\s+ )? \[\s*(?P<parts>{_PART}(?:\s*\|\s*{_PART})*)\s*\] (?(repeat)\)) )"
    rf"(?P<pad_rows>\+pad)? (?: \s+(?P<columns>{_SIZE}) (?P<pad_columns>\+pad)? )?",
    re.VERBOSE,
)
_CONDITION = re.compile(r"\sif\s+(?P<negated>not\s+)?(?P<field>\w+)$")
_DTYPE = re.compile(r"\sin\s+fp32$")
_INDEX = re.compile(r"\{([A-Z])\}")
_ALTERNATIVES = re.compile(r"\{([^{}]*,[^{}]*)\}")

_WHOLE = ""
"""Part name of a layout that is one HF tensor."""


@dataclass(frozen=True, slots=True)
class Run:
    """`rows` rows that lie together on both sides: from `hf_row0` in the HF, from `mcore_row0` in the megatron-core tensor."""

    hf_name: str
    hf_row0: int
    mcore_row0: int
    rows: int


@dataclass(frozen=True, slots=True)
class Layout:
    """A parsed layout string. Sizes are still expressions; `parts` are (part name, rows in one repetition)."""

    repeat: str
    parts: tuple[tuple[str, str], ...]
    columns: str | None
    padded: tuple[bool, bool]
    """Whether rows and columns may be padded."""

    @property
    def part_names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.parts)


@dataclass(frozen=True, slots=True)
class Condition:
    """The tensor exists where the truth of the HF config's `field` is `value`."""

    field: str
    value: bool


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of a family table."""

    mcore_pattern: str
    hf_pattern: str
    layout: Layout
    condition: Condition | None
    in_fp32: bool

    @property
    def indices(self) -> tuple[str, ...]:
        """The index letters of the names, for example ("L",)."""
        return tuple(dict.fromkeys(_INDEX.findall(self.mcore_pattern)))

    def hf_names(self) -> dict[str, str]:
        """Part name -> HF name pattern."""
        return {part: _ALTERNATIVES.sub(part, self.hf_pattern) for part in self.layout.part_names}


@dataclass(frozen=True, slots=True)
class CompiledLayout:
    """A layout with numbers. Shapes are (rows,) or (rows, columns); the `hf_name` of a run is still the part's name."""

    mcore_shape: tuple[int, ...]
    part_shapes: tuple[tuple[str, tuple[int, ...]], ...]
    runs: tuple[Run, ...]


def parse_table(text: str) -> tuple[Rule, ...]:
    """The rules of a family table, in its order. A line that is not in the language is a MappingError that quotes it."""
    lines = (line.strip() for line in text.splitlines())
    return tuple(_parse_rule(line) for line in lines if line and not line.startswith("#"))


def _parse_rule(line: str) -> Rule:
    condition = None
    body = line
    if match := _CONDITION.search(line):
        condition = Condition(match["field"], value=match["negated"] is None)
        body = line[: match.start()].rstrip()
    in_fp32 = _DTYPE.search(body) is not None
    fields = _DTYPE.sub("", body).split(maxsplit=2)
    if len(fields) != 3:
        raise MappingError(f"table line {line!r} has {len(fields)} columns; write: megatron-core name, HF name, layout")
    rule = Rule(fields[0], fields[1], parse_layout(fields[2]), condition, in_fp32)
    _check_names(line, rule)
    return rule


def parse_layout(text: str) -> Layout:
    """Parse a layout string; see the top of this file for the language."""
    match = _LAYOUT.fullmatch(text)
    if match is None:
        raise MappingError(
            f"layout {text!r} cannot be read; write `rows`, `[a:x | b:y]` or `(g [a:x | b:y])`, then any columns, each with or without `+pad`"
        )
    parts: list[tuple[str, str]] = [(_WHOLE, match["rows"])]
    if match["parts"]:
        parts = [(name.strip(), size.strip()) for name, size in (part.split(":") for part in match["parts"].split("|"))]
    padded = (match["pad_rows"] is not None, match["pad_columns"] is not None)
    return Layout(match["repeat"] or "1", tuple(parts), match["columns"], padded)


def _check_names(line: str, rule: Rule) -> None:
    """Refuse names whose braces do not fit the layout or each other."""
    braces = [tuple(group.split(",")) for group in _ALTERNATIVES.findall(rule.hf_pattern)]
    parts = [rule.layout.part_names] if rule.layout.part_names != (_WHOLE,) else []
    if braces != parts:
        raise MappingError(
            f"table line {line!r}: the HF name has {braces} in braces, the layout has parts {parts}; they must be equal"
        )
    if set(_INDEX.findall(rule.hf_pattern)) != set(rule.indices):
        raise MappingError(f"table line {line!r}: both names must have the same index letters")
    for name in (rule.mcore_pattern, *rule.hf_names().values()):
        if set("{},") & set(_INDEX.sub("", name)):
            raise MappingError(f"table line {line!r}: braces in {name!r} are neither an index {{L}} nor the parts of the layout")


def compile_layout(layout: Layout, sizes: Mapping[str, int]) -> CompiledLayout:
    """Put numbers into a layout. A symbol without a size is a MappingError."""
    columns = () if layout.columns is None else (evaluate_size(layout.columns, sizes),)
    repeat = evaluate_size(layout.repeat, sizes)
    part_rows = [(name, evaluate_size(size, sizes)) for name, size in layout.parts]
    runs = []
    mcore_row = 0
    for repetition in range(repeat):
        for name, rows in part_rows:
            runs.append(Run(name, repetition * rows, mcore_row, rows))
            mcore_row += rows
    return CompiledLayout(
        mcore_shape=(mcore_row, *columns),
        part_shapes=tuple((name, (repeat * rows, *columns)) for name, rows in part_rows),
        runs=tuple(runs),
    )


def evaluate_size(expression: str, sizes: Mapping[str, int]) -> int:
    """The value of a product such as `n*d` or `2*f`."""
    factors = expression.split("*")
    if unknown := [factor for factor in factors if not factor.isdigit() and factor not in sizes]:
        raise MappingError(f"size {expression!r} uses {unknown}, which is none of the family's symbols {sorted(sizes)}")
    return math.prod(int(factor) if factor.isdigit() else sizes[factor] for factor in factors)


def index_values(
    indices: tuple[str, ...], sizes: Mapping[str, int], given: Mapping[str, Sequence[int]] | None = None
) -> Iterator[dict[str, int]]:
    """Every assignment of the index letters, the last letter running fastest; one empty assignment when there are none.

    A letter takes its values from `given`, else 0 .. sizes[letter] - 1.
    """
    given = given or {}
    ranges = (given[letter] if letter in given else range(evaluate_size(letter, sizes)) for letter in indices)
    for values in itertools.product(*ranges):
        yield dict(zip(indices, values, strict=True))


def fill_indices(pattern: str, values: Mapping[str, int]) -> str:
    """Replace {L} by its value."""
    return _INDEX.sub(lambda match: str(values[match[1]]), pattern)
