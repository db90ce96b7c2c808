"""Copy plans between HF tensors and the pieces of them that megatron-core ranks hold.

`compile_mapping` turns a config.json into a `ModelMapping`; the compiler proves that it tiles. A rank describes what it holds as
boxes in megatron-core's global coordinates, and `import_plan` intersects the two. Read from right to left the same copies are
the export, and `sync.py` cuts them into buckets. Nothing here knows about tensor or pipeline parallelism: boxes say it all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from dapo_megatron.types import MappingError
from dapo_megatron.weights.codecs import block_of
from dapo_megatron.weights.families import family_of, with_defaults
from dapo_megatron.weights.layout import Rule, Run, compile_layout, fill_indices, index_values, parse_table
from dapo_megatron.weights.tiling import Rectangle, prove_tiling

_TABLE_REMEDY = "correct the family's table"
_BOXES_REMEDY = "pass every owner's boxes once, and no replicas"


@dataclass(frozen=True, slots=True)
class Box:
    """The piece of a megatron-core tensor that a rank holds.

    `offset` and `shape` are in the tensor's global coordinates, of `global_shape`: (rows,) or (rows, columns). A gated
    `linear_fc1.weight` is two boxes, for its gate rows and its up rows.
    """

    name: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    global_shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Copy:
    """`boxes[box_index][box_slices]` and `hf[hf_name][hf_slices]` hold the same elements in the same order."""

    hf_name: str
    hf_slices: tuple[slice, ...]
    box_index: int
    box_slices: tuple[slice, ...]


@dataclass(frozen=True, slots=True)
class MappedTensor:
    """A megatron-core tensor: `shape` (rows,) or (rows, columns) without padding; `padded`: whether that axis may be longer.

    `in_fp32`: megatron-core keeps it in fp32 whatever the model's dtype.
    """

    shape: tuple[int, ...]
    padded: tuple[bool, bool]
    runs: tuple[Run, ...]
    in_fp32: bool = False


@dataclass(frozen=True)
class ModelMapping:
    """The mapping of one model: every element of every HF tensor has exactly one place in a megatron-core tensor.

    Construction proves it; a mapping that does not tile is a MappingError and never exists.
    """

    tensors: Mapping[str, MappedTensor]
    """By megatron-core name, layers and experts counted from 0 over the whole model, one tensor an expert."""
    hf_tensors: Mapping[str, tuple[int, ...]]
    """HF name -> shape, in the order weights are sent."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Ending of another megatron-core name -> ending used in `tensors`."""
    skipped: Mapping[str, str] = field(default_factory=dict)
    """Pattern of HF names that the files may hold besides `hf_tensors` -> why they are not loaded."""

    def __post_init__(self) -> None:
        hf_rows: dict[str, list[Rectangle]] = defaultdict(list)
        for name, tensor in self.tensors.items():
            mcore_rows = []
            for run in tensor.runs:
                if run.hf_name not in self.hf_tensors:
                    raise MappingError(
                        f"{name} takes rows of {run.hf_name}, which is not an HF tensor of the model; {_TABLE_REMEDY}"
                    )
                if self.hf_tensors[run.hf_name][1:] != tensor.shape[1:]:
                    shapes = f"{name} {tensor.shape} and {run.hf_name} {self.hf_tensors[run.hf_name]}"
                    raise MappingError(f"{shapes} must have equal columns; {_TABLE_REMEDY}")
                mcore_rows.append(Rectangle(run.mcore_row0, run.mcore_row0 + run.rows))
                hf_rows[run.hf_name].append(Rectangle(run.hf_row0, run.hf_row0 + run.rows))
            prove_tiling(name, tensor.shape[:1], mcore_rows, _TABLE_REMEDY)
        for hf_name, shape in self.hf_tensors.items():
            prove_tiling(hf_name, shape[:1], hf_rows[hf_name], _TABLE_REMEDY)

    def dtype_of(self, hf_name: str, dtype: str) -> str:
        """In which an HF tensor travels where the others have `dtype`, both by their torch names."""
        return "float32" if hf_name in self._hf_tensors_in_fp32 else dtype

    @cached_property
    def _hf_tensors_in_fp32(self) -> frozenset[str]:
        return frozenset(run.hf_name for tensor in self.tensors.values() if tensor.in_fp32 for run in tensor.runs)

    def canonical_name(self, name: str) -> str:
        """The name a megatron-core tensor has in `tensors`. MappingError when the model has no such tensor."""
        for ending, canonical_ending in self.aliases.items():
            if name.endswith(ending):
                name = name.removesuffix(ending) + canonical_ending
        if name not in self.tensors:
            raise MappingError(f"{name} is not a tensor of this model; leave it out, or add it to the family's table")
        return name

    def tensor(self, name: str) -> MappedTensor:
        """The tensor of that megatron-core name, in either layer spec."""
        return self.tensors[self.canonical_name(name)]


def compile_mapping(hf_config: Mapping[str, Any]) -> ModelMapping:
    """The mapping of the model whose config.json is `hf_config`.

    MappingError names an unsupported `model_type` or field, or the tensor and rows where the family's table does not tile.
    """
    family = family_of(hf_config)
    block_of(hf_config)  # raises for a quantisation that no codec reads
    config = with_defaults(hf_config, family)
    rules = tuple(rule for rule in parse_table(family.table) if _exists(rule, config))
    tensors, hf_tensors = compile_rules(rules, family.sizes(config), family.layers(config))
    return ModelMapping(tensors, hf_tensors, family.aliases, family.skipped(config))


def compile_rules(
    rules: Sequence[Rule], sizes: Mapping[str, int], layers: Mapping[str, Sequence[int]] | None = None
) -> tuple[dict[str, MappedTensor], dict[str, tuple[int, ...]]]:
    """Put numbers into parsed rules: `tensors` and `hf_tensors` of a `ModelMapping`.

    Symbols and index letters are keys of `sizes`, or a letter has its values in `layers`.
    """
    tensors: dict[str, MappedTensor] = {}
    hf_tensors: dict[str, tuple[int, ...]] = {}
    layouts = {rule: compile_layout(rule.layout, sizes) for rule in rules}
    for rule, values in _instances(rules, sizes, layers):
        layout = layouts[rule]
        hf_names = {part: fill_indices(pattern, values) for part, pattern in rule.hf_names().items()}
        mcore_name = fill_indices(rule.mcore_pattern, values)
        if mcore_name in tensors:
            raise MappingError(f"{mcore_name} has two lines in the family's table; leave one")
        for part, shape in layout.part_shapes:
            if hf_names[part] in hf_tensors:
                raise MappingError(
                    f"{hf_names[part]} is used by two lines of the family's table: its rows are covered twice; leave one"
                )
            hf_tensors[hf_names[part]] = shape
        runs = tuple(Run(hf_names[run.hf_name], run.hf_row0, run.mcore_row0, run.rows) for run in layout.runs)
        tensors[mcore_name] = MappedTensor(layout.mcore_shape, rule.layout.padded, runs, rule.in_fp32)
    return tensors, hf_tensors


def _exists(rule: Rule, config: Mapping[str, Any]) -> bool:
    return rule.condition is None or bool(config.get(rule.condition.field)) == rule.condition.value


def _instances(
    rules: Sequence[Rule], sizes: Mapping[str, int], layers: Mapping[str, Sequence[int]] | None
) -> Iterator[tuple[Rule, dict[str, int]]]:
    """Every rule with every value of its indices: first what belongs to no layer, then layer after layer, expert after expert."""
    instances = [(rule, values) for rule in rules for values in index_values(rule.indices, sizes, layers)]
    yield from sorted(instances, key=lambda instance: tuple(instance[1].values()))


def import_plan(mapping: ModelMapping, boxes: Sequence[Box]) -> tuple[Copy, ...]:
    """The copies that fill `boxes` from HF tensors, in the order of the boxes.

    Every element of a box is the target of exactly one copy, or padding (`padding_slices`), which the caller sets to zero.
    MappingError for a box whose global shape is not that of the mapping.
    """
    return tuple(copy for box_index, box in enumerate(boxes) for copy in _copies(mapping, box_index, box))


def padding_slices(mapping: ModelMapping, box: Box) -> tuple[tuple[slice, ...], ...]:
    """The parts of `box` that are padding, as slices into the box; empty for most boxes."""
    mapped = _mapped_shape(_checked_tensor(mapping, box), box)
    regions = [
        tuple(slice(mapped[axis] if axis == padded_axis else 0, size) for axis, size in enumerate(box.shape))
        for padded_axis in range(len(box.shape))
    ]
    return tuple(region for axis, region in enumerate(regions) if mapped[axis] < box.shape[axis])


def check_cover(mapping: ModelMapping, boxes: Iterable[Box]) -> None:
    """Raise MappingError unless `boxes`, those of all owners together, hold every element of the model exactly once."""
    rectangles: dict[str, list[Rectangle]] = defaultdict(list)
    for box in boxes:
        tensor = _checked_tensor(mapping, box)
        mapped = _mapped_shape(tensor, box)
        if all(mapped):
            rectangles[mapping.canonical_name(box.name)].append(Rectangle.of(_slices(box.offset, mapped)))
    for name, tensor in mapping.tensors.items():
        prove_tiling(name, tensor.shape, rectangles[name], _BOXES_REMEDY)


def _copies(mapping: ModelMapping, box_index: int, box: Box) -> Iterator[Copy]:
    """Intersect one box with its tensor's runs."""
    tensor = _checked_tensor(mapping, box)
    num_rows, *num_columns = _mapped_shape(tensor, box)
    if not all(num_columns):
        return
    hf_columns = _slices(box.offset[1:], tuple(num_columns))
    box_columns = _slices((0,) * len(hf_columns), tuple(num_columns))
    box_row0, box_row1 = box.offset[0], box.offset[0] + num_rows
    num_copied = 0
    for run in tensor.runs:
        row0, row1 = max(run.mcore_row0, box_row0), min(run.mcore_row0 + run.rows, box_row1)
        if row0 >= row1:
            continue
        hf_row0 = run.hf_row0 + row0 - run.mcore_row0
        hf_rows = slice(hf_row0, hf_row0 + row1 - row0)
        yield Copy(run.hf_name, (hf_rows, *hf_columns), box_index, (slice(row0 - box_row0, row1 - box_row0), *box_columns))
        num_copied += row1 - row0
    # The runs tile the tensor (proven at construction), so equal counts mean that each row was written once.
    if num_copied != num_rows:
        raise MappingError(f"{box}: {num_copied} rows are written, {num_rows} are mapped; {_TABLE_REMEDY}")


def _slices(offset: tuple[int, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))


def _mapped_shape(tensor: MappedTensor, box: Box) -> tuple[int, ...]:
    """Rows and columns of the box that are not padding; they come first."""
    sizes = zip(tensor.shape, box.offset, box.shape, strict=True)
    return tuple(min(max(total - start, 0), size) for total, start, size in sizes)


def _checked_tensor(mapping: ModelMapping, box: Box) -> MappedTensor:
    """The tensor of a box, after the box was checked against it."""
    tensor = mapping.tensor(box.name)
    fits = len(box.global_shape) == len(tensor.shape) and all(
        have == want or (have > want and padded)
        for have, want, padded in zip(box.global_shape, tensor.shape, tensor.padded, strict=False)
    )
    if not fits:
        longer = " or".join(
            f" have more {axis}" for axis, padded in zip(("rows", "columns"), tensor.padded, strict=True) if padded
        )
        rule = f"must be {tensor.shape}{' or' + longer if longer else ''}, as config.json says"
        raise MappingError(f"{box.name}: global shape {box.global_shape} {rule}; build the model from this config.json")
    if not _is_inside(box):
        rule = f"must be non-empty and lie inside {box.global_shape}"
        raise MappingError(f"{box.name}: box at {box.offset} of shape {box.shape} {rule}; correct the box")
    return tensor


def _is_inside(box: Box) -> bool:
    return len(box.offset) == len(box.shape) == len(box.global_shape) and all(
        start >= 0 and size > 0 and start + size <= total
        for start, size, total in zip(box.offset, box.shape, box.global_shape, strict=True)
    )
