"""The HF tensors that a Megatron checkpoint holds: proven complete before anything is read, each a list of places in its files."""

from __future__ import annotations

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from checkpoint_tools.readers import Reader
from checkpoint_tools.spans import Span, SpanReader, SpanTensor
from checkpoint_tools.torch_dist import Chunk, LocatedChunk, TorchDistTensor
from dapo_megatron.types import MappingError
from dapo_megatron.weights.checkpoint_keys import num_stacked_axes, unstacked_name
from dapo_megatron.weights.plan import Box, ModelMapping, check_cover, import_plan, padding_slices

_LEFT_OUT = {
    r"(chained_\d+\.)?optimizer\..*": "optimizer state",
    r".*\._extra_state(/.*)?": "TransformerEngine's scaling state",
    r"mtp\..*": "multi-token-prediction layers",
}
"""Pattern of keys that belong to no HF tensor -> what they are."""
_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
_PADDING_BAND_BYTES = 2**24


@dataclass(frozen=True, slots=True)
class MegatronSource:
    """The tensors of a checkpoint in HF layout."""

    tensors: Mapping[str, SpanTensor]
    """By HF name, in the mapping's order."""
    left_out: Mapping[str, int]
    """What the checkpoint has besides, and how many tensors of it."""
    padding: Mapping[str, int]
    """Megatron name of a padded tensor -> elements that are padding and belong to no HF tensor."""


def open_megatron(reader: Reader, mapping: ModelMapping) -> MegatronSource:
    """Find every HF tensor of `mapping` in the checkpoint.

    MappingError unless each of their elements is saved exactly once, and every other saved element is padding or left out for a
    known reason. Padding of query groups must be zero; that of the vocabulary may be anything, training can leave noise there.
    """
    left_out: dict[str, int] = defaultdict(int)
    dtypes: dict[str, str] = {}
    boxes: list[Box] = []
    places: list[LocatedChunk] = []
    for key, tensor in reader.tensors.items():
        reason = next((reason for pattern, reason in _LEFT_OUT.items() if re.fullmatch(pattern, key)), None)
        if reason is not None:
            left_out[reason] += 1
            continue
        for chunk in tensor.chunks:
            for box, place in _boxes(reader, mapping, tensor, chunk):
                boxes.append(box)
                places.append(place)
                dtypes[box.name] = tensor.dtype
    _check_complete(reader, mapping, boxes)
    spans: dict[str, list[Span]] = defaultdict(list)
    hf_dtypes: dict[str, set[str]] = defaultdict(set)
    for copy in import_plan(mapping, boxes):
        place = places[copy.box_index]
        spans[copy.hf_name].append(_span(place, copy.box_slices, copy.hf_slices))
        hf_dtypes[copy.hf_name].add(dtypes[boxes[copy.box_index].name])
    tensors = {}
    for name, shape in mapping.hf_tensors.items():
        if len(hf_dtypes[name]) != 1:
            raise MappingError(f"{reader.directory}: {name} is saved as {sorted(hf_dtypes[name])}; save the model in one dtype")
        (dtype,) = hf_dtypes[name]
        tensors[name] = SpanTensor(name, shape, dtype, tuple(sorted(spans[name], key=lambda span: (span.row0, span.column0))))
    return MegatronSource(tensors, dict(left_out), _check_padding(mapping, boxes, places, dtypes))


def _boxes(reader: Reader, mapping: ModelMapping, tensor: TorchDistTensor, chunk: Chunk) -> Iterator[tuple[Box, LocatedChunk]]:
    """A chunk as boxes of the mapping's tensors: one for each layer and expert of a stacked tensor."""
    stacked = num_stacked_axes(tensor.key)
    place = reader.locate(tensor, chunk)
    leading = zip(chunk.offset[:stacked], chunk.shape[:stacked], strict=True)
    for index in itertools.product(*(range(start, start + size) for start, size in leading)):
        try:
            name = mapping.canonical_name(unstacked_name(tensor.key, index))
            box = Box(name, chunk.offset[stacked:], chunk.shape[stacked:], tensor.shape[stacked:])
            padding_slices(mapping, box)  # checks the box
        except MappingError as error:
            raise MappingError(f"{reader.directory}: {error}") from error
        inside = zip(index, chunk.offset, place.strides, strict=False)
        start = place.start + sum((i - first) * stride for i, first, stride in inside)
        yield box, LocatedChunk(place.file, start, place.strides[stacked:])


def _span(place: LocatedChunk, box_slices: tuple[slice, ...], hf_slices: tuple[slice, ...]) -> Span:
    """Where the part `box_slices` of a placed box lies, as the part `hf_slices` of an HF tensor."""
    start = place.start + sum(part.start * stride for part, stride in zip(box_slices, place.strides, strict=True))
    rows, *columns = hf_slices
    column0, num_columns = (columns[0].start, columns[0].stop - columns[0].start) if columns else (0, 1)
    row_stride, *column_strides = place.strides
    column_stride = column_strides[0] if columns else row_stride
    return Span(place.file, start, row_stride, column_stride, rows.start, rows.stop - rows.start, column0, num_columns)


def _check_complete(reader: Reader, mapping: ModelMapping, boxes: list[Box]) -> None:
    """Every tensor, and of each every element exactly once."""
    if missing := sorted(set(mapping.tensors) - {box.name for box in boxes}):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise MappingError(
            f"{reader.directory} lacks {missing[0]}{more}, which config.json asks for; use the config.json of this model"
        )
    try:
        check_cover(mapping, boxes)
    except MappingError as error:
        raise MappingError(f"{reader.directory}: {error}") from error


def _check_padding(
    mapping: ModelMapping, boxes: list[Box], places: list[LocatedChunk], dtypes: Mapping[str, str]
) -> dict[str, int]:
    padding: dict[str, int] = {}
    reader = SpanReader()
    for box, place in zip(boxes, places, strict=True):
        parts = padding_slices(mapping, box)
        if not parts:
            continue
        num_mapped = sum(_num_elements(copy.box_slices) for copy in import_plan(mapping, [box]))
        padding[box.name] = padding.get(box.name, 0) + math.prod(box.shape) - num_mapped
        if box.name not in _VOCABULARY:
            for part in parts:
                _check_zero(reader, box.name, place, part, dtypes[box.name])
    reader.close()
    return padding


def _check_zero(reader: SpanReader, name: str, place: LocatedChunk, part: tuple[slice, ...], dtype: str) -> None:
    shape = tuple(axis.stop - axis.start for axis in part)
    at_origin = tuple(slice(0, size) for size in shape)
    tensor = SpanTensor(name, shape, dtype, (_span(place, part, at_origin),))
    for row0, row1 in tensor.bands(_PADDING_BAND_BYTES):
        if reader.read_rows(tensor, row0, row1).any():
            raise MappingError(
                f"{place.file}: the padding of {name} beyond the query groups of config.json is not zero; "
                "use the config.json of this model"
            )


def _num_elements(slices: tuple[slice, ...]) -> int:
    return math.prod(part.stop - part.start for part in slices)
