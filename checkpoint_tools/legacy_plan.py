"""The rank files of a legacy checkpoint under another layout: what is in each, and where its elements come from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from checkpoint_tools.legacy_layout import (
    EMBEDDING,
    OUTPUT_LAYER,
    Layout,
    Rank,
    Strip,
    chunk_names,
    cut_of,
    divisors,
    expert_of,
    layer_of,
    local_name,
    strips,
)
from checkpoint_tools.legacy_reader import LegacyReader
from checkpoint_tools.spans import Span, SpanTensor
from checkpoint_tools.torch_dist import TorchDistTensor
from checkpoint_tools.torch_zip import STORAGES, TENSOR_ALIGNMENT, ArchivePlan, plan_archive, tensor
from dapo_megatron.types import ConfigError, MappingError
from dapo_megatron.weights.hf_headers import ITEMSIZE

_VOCABULARY = (EMBEDDING, OUTPUT_LAYER)
_LAST = ("decoder.final_layernorm.", "output_layer.")
_FIRST_LAYER, _LAST_LAYER = -1, 10**9
"""Where tensors that belong to no layer stand among them."""


@dataclass(frozen=True, slots=True)
class RankFile:
    """`tensors[i]` goes to `archive.starts[i]`. Of a tensor with padding below it is the rows above."""

    folder: str
    archive: ArchivePlan
    tensors: tuple[SpanTensor, ...]


def padded_size(size: int, divisible_by: int, layout: Layout) -> int:
    """Rows of the vocabulary as Megatron-LM pads them."""
    multiple = divisible_by * layout.tensor
    return math.ceil(size / multiple) * multiple


def check_divides(reader: LegacyReader, layout: Layout) -> None:
    """Raise ConfigError, with the sizes that can, unless the layout divides heads, groups, experts and every cut tensor."""
    sizes = {False: reader.argument("num_attention_heads", 0), True: 0}
    for name, whole in reader.tensors.items():
        if not whole.chunks or name in _VOCABULARY:
            continue
        cut = cut_of(name, reader.architecture)
        if cut.axis is not None:
            of_expert = expert_of(name) is not None
            sizes[of_expert] = math.gcd(sizes[of_expert], whole.shape[cut.axis] // cut.num_parts)
    groups = reader.argument("num_query_groups", 1) if reader.argument("group_query_attention", False) else layout.tensor
    fitting = [size for size in divisors(sizes[False]) if groups % size == 0 or size % groups == 0]
    problems = []
    if layout.tensor not in fitting:
        problems.append(
            f"--tensor ({layout.tensor}) must divide the heads and every tensor, and divide the query groups ({groups}) or be a "
            f"multiple of them; choose one of {fitting}"
        )
    num_experts = reader.argument("num_experts", 1)
    if num_experts % layout.expert:
        problems.append(
            f"--expert ({layout.expert}) must divide the {num_experts} experts; choose one of {divisors(num_experts)}"
        )
    if sizes[True] % layout.expert_tensor:
        possible = [size for size in divisors(sizes[True]) if layout.tensor % size == 0]
        problems.append(
            f"--expert-tensor ({layout.expert_tensor}) must divide the {sizes[True]} rows of an expert; choose one of {possible}"
        )
    if problems:
        raise ConfigError(problems)


def plan_rank_files(reader: LegacyReader, layout: Layout, padded_vocab: int, common: Mapping[str, Any]) -> list[RankFile]:
    """Every file of `layout`. `common`: what each has beside its models, as `pickle_writer` describes it.

    MappingError for a tensor that has no place under another layout.
    """
    if left := [name for name in reader.tensors if name.startswith("mtp.")]:
        raise MappingError(
            f"{reader.directory}: {left[0]} is of a layer for multi-token prediction; load and save it with Megatron-LM, "
            "--ckpt-format torch_dist, which loads under any layout"
        )
    contents = _contents(reader, layout)
    return [_plan_file(reader, layout, rank, contents[rank.pipeline], padded_vocab, common) for rank in layout.ranks]


def _contents(reader: LegacyReader, layout: Layout) -> list[list[list[str]]]:
    """Names in the whole model by [stage][chunk], in the order of the layers."""
    names: list[list[list[str]]] = [[[] for _ in stage] for stage in layout.layers]
    whole = [name for name, value in reader.tensors.items() if value.chunks]
    if layout.pipeline > 1 and OUTPUT_LAYER not in reader.tensors:
        whole.append(OUTPUT_LAYER)  # the last stage has its own copy of tied embeddings
    for name in sorted([*whole, *reader.objects], key=_position):
        layer = layer_of(name)
        if layer is not None:
            stage, chunk = layout.place(layer)
        else:
            stage, chunk = (layout.pipeline - 1, layout.num_chunks - 1) if name.startswith(_LAST) else (0, 0)
        names[stage][chunk].append(name)
    return names


def _position(name: str) -> int:
    layer = layer_of(name)
    return layer if layer is not None else _LAST_LAYER if name.startswith(_LAST) else _FIRST_LAYER


def _plan_file(
    reader: LegacyReader, layout: Layout, rank: Rank, contents: list[list[str]], padded_vocab: int, common: Mapping[str, Any]
) -> RankFile:
    folder = layout.folder(rank)
    num_local = reader.argument("num_experts", 0) // layout.expert
    first_expert = rank.expert * num_local
    value = dict(common)
    tensors: list[SpanTensor] = []
    sizes: list[int] = []
    for chunk, key in enumerate(chunk_names(layout.num_chunks)):
        model: dict[str, Any] = {}
        first_layer = layout.first_layer(rank.pipeline, chunk)
        for name in contents[chunk]:
            expert = expert_of(name)
            if expert is not None and not first_expert <= expert < first_expert + num_local:
                continue
            local = local_name(name, first_layer, first_expert, grouped_experts=reader.has_grouped_experts)
            if name in reader.objects:
                model[local] = None
                continue
            source = reader.tensors[EMBEDDING if name == OUTPUT_LAYER and name not in reader.tensors else name]
            if source.dtype not in STORAGES:
                raise MappingError(f"{reader.directory}: {name} is {source.dtype}, must be one of {', '.join(STORAGES)}")
            shape, mapped = _local_tensor(reader, layout, rank, source, padded_vocab, f"{folder}/{key}.{local}")
            model[local] = tensor(len(sizes), source.dtype, shape)
            sizes.append(math.prod(shape) * ITEMSIZE[source.dtype])
            tensors.append(mapped)
        value[key] = model
    return RankFile(folder, plan_archive(value, sizes, TENSOR_ALIGNMENT), tuple(tensors))


def _local_tensor(
    reader: LegacyReader, layout: Layout, rank: Rank, source: TorchDistTensor, padded_vocab: int, what: str
) -> tuple[tuple[int, ...], SpanTensor]:
    """The shape of a rank's part of a tensor, and where those of its rows come from that are no new padding."""
    cut = cut_of(source.key, reader.architecture)
    axis = cut.axis or 0
    place, num_ranks = (
        (rank.tensor, layout.tensor) if expert_of(source.key) is None else (rank.expert_tensor, layout.expert_tensor)
    )
    size = source.shape[axis]
    is_vocabulary = source.key in _VOCABULARY
    of_rank = (Strip(0, 0, size),) if cut.axis is None else strips(cut, padded_vocab if is_vocabulary else size, place, num_ranks)
    shape = list(source.shape)
    shape[axis] = sum(strip.size for strip in of_rank)
    mapped = list(shape)
    if is_vocabulary:
        mapped[0] = min(max(min(size, padded_vocab) - of_rank[0].whole, 0), shape[0])
    limit = mapped[0] if is_vocabulary else shape[axis]
    spans = [span for strip in of_rank for span in _spans(reader, source, axis, strip, limit)]
    spans.sort(key=lambda span: (span.row0, span.column0))
    return tuple(shape), SpanTensor(what, tuple(mapped), source.dtype, tuple(spans))


def _spans(reader: LegacyReader, source: TorchDistTensor, axis: int, strip: Strip, limit: int) -> Iterator[Span]:
    """Where a strip comes from, as far as it lies before `limit` of the rank's tensor."""
    end = strip.whole + min(strip.size, limit - strip.local)
    for chunk in source.chunks:
        start, stop = max(chunk.offset[axis], strip.whole), min(chunk.offset[axis] + chunk.shape[axis], end)
        if start >= stop:
            continue
        place = reader.locate(source, chunk)
        first = place.start + (start - chunk.offset[axis]) * place.strides[axis]
        target, size = strip.local + start - strip.whole, stop - start
        row_stride, column_stride = place.strides[0], place.strides[-1]
        num_columns = source.shape[1] if len(source.shape) > 1 else 1
        if axis == 0:
            yield Span(place.file, first, row_stride, column_stride, target, size, 0, num_columns)
        else:
            yield Span(place.file, first, row_stride, column_stride, 0, source.shape[0], target, size)
