"""A legacy Megatron-LM checkpoint (`mp_rank_*` files) as whole tensors, each a list of places in the ranks' files.

Which layers a stage has is counted in the files, so uneven and virtual stages need no argument. Copies of one piece, which tensor-, expert-
and pipeline-parallel ranks have, are paired for `check_replicas`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint_tools.comparison import CompareTask, CompareWorker, Comparison, SpanRows
from checkpoint_tools.errors import reading
from checkpoint_tools.legacy_layout import (
    EMBEDDING,
    OUTPUT_LAYER,
    RANK_FILE,
    Architecture,
    Layout,
    Rank,
    chunk_names,
    cut_of,
    expert_of,
    is_grouped_expert,
    strips,
    whole_name,
)
from checkpoint_tools.progress import progress_bar
from checkpoint_tools.safe_pickle import DTYPES, Namespace, StoredTensor, load_common, stored_tensors
from checkpoint_tools.spans import ITEMSIZE, Span, SpanTensor
from checkpoint_tools.torch_archive import TorchArchive
from checkpoint_tools.torch_dist import Chunk, LocatedChunk, StoredBytes, TorchDistTensor
from checkpoint_tools.worker_pool import Pool, run_tasks
from dapo_megatron.types import CheckpointError, ConfigError
from dapo_megatron.weights.tiling import Rectangle, prove_tiling

_AGAIN = "get the complete checkpoint"
_OPTIMIZER = "optimizer"
_EXTRA_STATE = "._extra_state"
_NOT_CUT = ("mtp.",)
"""Beginnings of names that nothing here needs to know the cut of."""
_VERSION = 3.0
_ALIKE = ("iteration", "checkpoint_version")


@dataclass(frozen=True, slots=True)
class _File:
    rank: Rank
    path: Path
    content: Mapping[str, Any]
    """All but the tensors of the optimizer."""
    places: Mapping[str, tuple[int, int]]
    """Record of a model's tensor -> first byte and number of bytes."""


class LegacyReader:
    """One iteration's folder. Errors are CheckpointErrors that name file and tensor."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._tensors: dict[str, TorchDistTensor] = {}
        self._chunks: dict[str, list[Chunk]] = {}
        self._places: dict[tuple[str, tuple[int, ...]], LocatedChunk] = {}
        self.replicas: list[tuple[SpanTensor, SpanTensor]] = []
        """Pieces that must be equal, the first of the rank whose piece is used."""
        self.keys: set[str] = set()
        """Of what any rank's file has."""
        self.objects: dict[str, None] = {}
        """TransformerEngine's scaling state, by the whole model's names."""
        self.has_grouped_experts = False
        self._read()

    @property
    def tensors(self) -> Mapping[str, TorchDistTensor]:
        """By the names of the mapping tables. Those of the optimizer and of layers for multi-token prediction have no chunks."""
        return self._tensors

    @property
    def common(self) -> Mapping[str, Any]:
        """What the first rank has beside tensors: `args`, `iteration` and the like."""
        return self._common

    def locate(self, tensor: TorchDistTensor, chunk: Chunk) -> LocatedChunk:
        """Where the chunk's elements lie."""
        return self._places[tensor.key, chunk.offset]

    def argument(self, name: str, default: Any = None) -> Any:
        """One of Megatron-LM's arguments."""
        value = getattr(self.common["args"], name, None)
        return default if value is None else value

    def _read(self) -> None:
        folders = sorted(path for path in self.directory.glob("mp_rank_*") if path.is_dir())
        if not folders:
            raise CheckpointError(f"{self.directory} has no folder mp_rank_*; give the folder of an iteration")
        if not (folders[0] / RANK_FILE).is_file():
            raise CheckpointError(f"{self.directory} lacks {folders[0].name}/{RANK_FILE}; {_AGAIN}")
        first = self._open(Rank(0, 0, 0, 0), folders[0])
        if not isinstance(first.content.get("args"), Namespace):
            raise CheckpointError(
                f"{first.path} has no args, which say how the ranks were laid out; save it again with a newer Megatron-LM"
            )
        self._common = first.content
        version = self.common.get("checkpoint_version")
        if not isinstance(version, int | float) or version < _VERSION:
            raise CheckpointError(
                f"{first.path} has checkpoint_version {version}, must be {_VERSION}: q, k and v lie in another order; "
                "load and save it with Megatron-LM"
            )
        files = self._open_all()
        self.layout = self._layout_of(files)
        self.architecture = Architecture(bool(self.argument("swiglu")), self.argument("transformer_impl") == "local")
        shapes: dict[str, tuple[int, ...]] = {}
        for file in files:
            for chunk, key in enumerate(chunk_names(self.layout.num_chunks)):
                self._take_model(file, file.content[key], self.layout.first_layer(file.rank.pipeline, chunk), shapes)
        for name, chunks in self._chunks.items():
            tensor = self._tensors[name]
            self._tensors[name] = TorchDistTensor(name, tensor.shape, tensor.dtype, tuple(chunks))
            rectangles = [Rectangle.of(_slices(chunk.offset, chunk.shape)) for chunk in chunks]
            prove_tiling(f"{self.directory}: {name}", tensor.shape, rectangles, _AGAIN)

    def _sizes(self) -> tuple[int, int, int, int]:
        tensor = self.argument("tensor_model_parallel_size", 1)
        names = ("pipeline_model_parallel_size", "expert_model_parallel_size")
        return (tensor, *(self.argument(name, 1) for name in names), self.argument("expert_tensor_parallel_size", tensor))

    def _open_all(self) -> list[_File]:
        tensor, pipeline, expert, expert_tensor = self._sizes()
        try:
            layout = Layout(tensor, expert, expert_tensor, ((0,),) * pipeline)
        except ConfigError as error:
            raise CheckpointError(f"{self.directory}: {'; '.join(error.problems)}") from error
        paths = {rank: self.directory / layout.folder(rank) for rank in layout.ranks}
        missing = [path.name for path in paths.values() if not (path / RANK_FILE).is_file()]
        if missing:
            raise CheckpointError(
                f"{self.directory} lacks {missing[0]}/{RANK_FILE}: {len(missing)} of {len(paths)} rank files of {layout} are missing; {_AGAIN}"
            )
        files = [self._open(rank, path) for rank, path in paths.items()]
        for file in files:
            for name in _ALIKE:
                if file.content.get(name) != self.common.get(name):
                    raise CheckpointError(
                        f"{file.path}: {name} is {file.content.get(name)}, {files[0].path} has {self.common.get(name)}; "
                        "the files are of two checkpoints, get one of them complete"
                    )
        return files

    def _open(self, rank: Rank, folder: Path) -> _File:
        path = folder / RANK_FILE
        with reading(path), path.open("rb") as handle:
            content = load_common(handle, str(path))
            if not isinstance(content, dict):
                raise CheckpointError(f"{path} holds a {type(content).__name__}, must hold Megatron-LM's dict; {_AGAIN}")
            archive = TorchArchive(handle, str(path))
            if not archive.is_little_endian:
                raise CheckpointError(f"{path} is big-endian; save it on another machine")
            models = {name: value for name, value in content.items() if str(name).startswith("model")}
            places = {stored.record: archive.place(f"data/{stored.record}") for _, stored in stored_tensors(models, "")}
        self.keys |= content.keys()
        for name, stored in stored_tensors(content.pop(_OPTIMIZER, None), f"{_OPTIMIZER}.{folder.name}"):
            self._tensors[name] = TorchDistTensor(name, stored.shape, DTYPES[stored.dtype], ())
        return _File(rank, path, content, places)

    def _layout_of(self, files: list[_File]) -> Layout:
        tensor, pipeline, expert, expert_tensor = self._sizes()
        num_chunks = sum(1 for key in files[0].content if key == "model" or (key[:5] == "model" and key[5:].isdecimal()))
        if num_chunks == 0:
            raise CheckpointError(f"{files[0].path} has no model; {_AGAIN}")
        counts: dict[int, tuple[int, ...]] = {}
        for file in files:
            of_file = []
            for key in chunk_names(num_chunks):
                model = file.content.get(key)
                if not isinstance(model, dict) or not all(isinstance(name, str) for name in model):
                    raise CheckpointError(f"{file.path} has no {key}, which other ranks have; {_AGAIN}")
                if "language_model" in model:
                    raise CheckpointError(
                        f"{file.path} was saved before there was megatron-core; convert it with Megatron-LM's tools/checkpoint"
                    )
                of_file.append(len({name.split(".")[2] for name in file.content[key] if name.startswith("decoder.layers.")}))
            if counts.setdefault(file.rank.pipeline, tuple(of_file)) != tuple(of_file):
                have = counts[file.rank.pipeline]
                raise CheckpointError(f"{file.path} has {of_file} layers, another rank of its stage has {list(have)}; {_AGAIN}")
        layout = Layout(tensor, expert, expert_tensor, tuple(counts[stage] for stage in range(pipeline)))
        if layout.num_layers != self.argument("num_layers", layout.num_layers):
            raise CheckpointError(
                f"{self.directory}: the ranks have {layout.num_layers} layers, their args say {self.argument('num_layers')}; {_AGAIN}"
            )
        return layout

    def _take_model(self, file: _File, model: Mapping[str, Any], first_layer: int, shapes: dict[str, tuple[int, ...]]) -> None:
        first_expert = file.rank.expert * (self.argument("num_experts", 0) // self.layout.expert)
        for local, value in model.items():
            name = whole_name(local, first_layer, first_expert)
            if _EXTRA_STATE in name:
                self.objects[name] = None
                continue
            if not isinstance(value, StoredTensor):
                kind = type(value).__name__
                raise CheckpointError(f"{file.path}: {local} is no plain tensor but a {kind}; save it in bf16, fp16 or fp32")
            if name.startswith(_NOT_CUT):
                self._tensors[name] = TorchDistTensor(name, value.shape, DTYPES[value.dtype], ())
                continue
            self.has_grouped_experts |= is_grouped_expert(local) is True
            if name == OUTPUT_LAYER and not self.argument("untie_embeddings_and_output_weights", False):
                name = EMBEDDING  # the last stage's copy
            self._take_tensor(file, name, local, value, shapes)

    def _take_tensor(self, file: _File, name: str, local: str, value: StoredTensor, shapes: dict[str, tuple[int, ...]]) -> None:
        """Add the parts of a rank's tensor to the whole one, or to the replicas where they are there already."""
        cut = cut_of(name, self.architecture)
        rank, num_ranks = file.rank.tensor, self.layout.tensor
        if expert_of(name) is not None:
            rank, num_ranks = file.rank.expert_tensor, self.layout.expert_tensor
        shape = list(value.shape)
        dtype = DTYPES[value.dtype]
        if cut.axis is not None:
            if cut.axis >= len(shape) or shape[cut.axis] % cut.num_parts:
                raise CheckpointError(f"{file.path}: {local} has shape {value.shape}, which no rank's part of it has; {_AGAIN}")
            shape[cut.axis] *= num_ranks
        tensor = self._tensors.setdefault(name, TorchDistTensor(name, tuple(shape), dtype, ()))
        if (tensor.shape, tensor.dtype) != (tuple(shape), dtype):
            raise CheckpointError(
                f"{file.path}: {local} is {dtype} {tuple(shape)} over all ranks, another rank has {tensor.dtype} {tensor.shape}; {_AGAIN}"
            )
        place = _place(file, local, value)
        if cut.axis is None:
            self._take_part(tensor, file, (0,) * len(shape), tensor.shape, place)
            return
        for strip in strips(cut, shape[cut.axis], rank, num_ranks):
            offset, part = [0] * len(shape), list(shape)
            offset[cut.axis], part[cut.axis] = strip.whole, strip.size
            start = place.start + strip.local * place.strides[cut.axis]
            self._take_part(tensor, file, tuple(offset), tuple(part), LocatedChunk(place.file, start, place.strides))

    def _take_part(
        self, tensor: TorchDistTensor, file: _File, offset: tuple[int, ...], shape: tuple[int, ...], place: LocatedChunk
    ) -> None:
        first = self._places.setdefault((tensor.key, offset), place)
        if first is place:
            num_bytes = math.prod(shape) * ITEMSIZE[tensor.dtype]
            stored = StoredBytes(str(place.file.relative_to(self.directory)), place.start, num_bytes)
            self._chunks.setdefault(tensor.key, []).append(Chunk(offset, shape, stored))
            return
        a, b = (SpanTensor(tensor.key, shape, tensor.dtype, (_whole_span(where, shape),)) for where in (first, place))
        self.replicas.append((a, b))


def check_replicas(reader: LegacyReader, max_memory: int, num_workers: int | None) -> int:
    """Read every copy of a piece; how many there are. CheckpointError names the first tensor whose copies differ."""
    tasks = [CompareTask(f"{number} {a.name}", SpanRows(a), SpanRows(b)) for number, (a, b) in enumerate(reader.replicas)]
    num_bytes = sum(task.num_bytes for task in tasks)
    pool = Pool.choose(num_workers, max_memory, num_bytes)
    with progress_bar("compare copies", num_bytes) as report:
        for done in run_tasks(pool, CompareWorker, tasks, {}, report):
            comparison = Comparison(**done.record)
            if comparison.num_differing == 0:
                continue
            a, b = reader.replicas[int(done.name.split()[0])]
            files = " and ".join(side.spans[0].file.parent.name for side in (a, b))
            raise CheckpointError(
                f"{reader.directory}: {a.name} must be equal in {files}, and differs in {comparison.num_differing:,} elements (first at "
                f"{list(comparison.first_index or ())}: {comparison.first_a:.9g}, {comparison.first_b:.9g}); use another checkpoint"
            )
    return len(tasks)


def _place(file: _File, local: str, value: StoredTensor) -> LocatedChunk:
    """Where a stored tensor lies in its file."""
    start, num_bytes = file.places[value.record]
    itemsize = ITEMSIZE[DTYPES[value.dtype]]
    extent = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.strides, strict=True))
    if (
        not all(value.shape)
        or not value.shape
        or (value.offset + extent) * itemsize > num_bytes
        or start + num_bytes > file.path.stat().st_size
    ):
        raise CheckpointError(f"{file.path}: {local} is damaged, its elements are not all there; {_AGAIN}")
    return LocatedChunk(file.path, start + value.offset * itemsize, tuple(stride * itemsize for stride in value.strides))


def _whole_span(place: LocatedChunk, shape: tuple[int, ...]) -> Span:
    columns, column_stride = (shape[1], place.strides[1]) if len(shape) > 1 else (1, place.strides[0])
    return Span(place.file, place.start, place.strides[0], column_stride, 0, shape[0], 0, columns)


def _slices(offset: tuple[int, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
