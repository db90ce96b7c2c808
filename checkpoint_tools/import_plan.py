"""What hf-to-megatron will do, element by element, before it does any of it.

Every megatron-core tensor is one task: its rows, all columns, collected from the HF tensors that the mapping names. It is written as
chunks, each an archive of torch.save at a place of a file that is known now, so workers write in any order and a plan made again
after a kill is the same plan.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from checkpoint_tools.torch_zip import Frame, frame
from dapo_megatron.types import MappingError
from dapo_megatron.weights.checkpoint_keys import CheckpointPlace
from dapo_megatron.weights.codecs import FP8
from dapo_megatron.weights.hf_files import HfFiles
from dapo_megatron.weights.hf_headers import ITEMSIZE
from dapo_megatron.weights.plan import MappedTensor, ModelMapping
from dapo_megatron.weights.tiling import Rectangle, prove_tiling

CHUNK_BYTES = 64 * 2**20
"""At most, unless one row is longer: a rank reads whole chunks, so small ones spare it what other ranks hold."""
FILE_BYTES = 4 * 2**30
"""A file ends with the tensor that reaches this."""


@dataclass(frozen=True, slots=True)
class SourceRun:
    """Rows of an HF tensor that lie together on both sides; `offset` is where the first of them is in `file`."""

    hf_name: str
    hf_row0: int
    mcore_row0: int
    rows: int
    file: str
    offset: int
    file_dtype: str


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows [row0, row0 + rows) of the tensor, as an archive at `offset` of the task's file."""

    row0: int
    rows: int
    offset: int


@dataclass(frozen=True, slots=True)
class ImportTask:
    """One megatron-core tensor (rows,) or (rows, columns); dtypes as safetensors writes them."""

    name: str
    """In the mapping."""
    place: CheckpointPlace
    shape: tuple[int, ...]
    dtype: str
    """In the checkpoint."""
    hf_dtype: str
    """Of the HF tensors that the checkpoint stands for: the manifest's."""
    runs: tuple[SourceRun, ...]
    file: str
    chunks: tuple[Chunk, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZE[self.dtype]

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * ITEMSIZE[self.dtype]

    def is_plain(self, run: SourceRun) -> bool:
        """Whether its rows go through as bytes."""
        return run.file_dtype == self.hf_dtype == self.dtype

    def frame(self, chunk: Chunk) -> Frame:
        """The bytes around the chunk's elements."""
        return frame(self.dtype, self.chunk_shape(chunk))

    def stored_bytes(self, chunk: Chunk) -> int:
        """Length of the chunk's archive."""
        around = self.frame(chunk)
        return len(around.before) + chunk.rows * self.row_bytes + len(around.after)

    def chunk_shape(self, chunk: Chunk) -> tuple[int, ...]:
        """With the leading axes of stacked layers and experts."""
        return (*(1 for _ in self.place.axes), chunk.rows, *self.shape[1:])

    def chunk_offset(self, chunk: Chunk) -> tuple[int, ...]:
        """In the tensor of the checkpoint."""
        return (*self.place.index, chunk.row0, *(0 for _ in self.shape[1:]))


@dataclass(frozen=True)
class ImportPlan:
    """`tasks` in the order of their bytes in the HF files; `files` of the checkpoint with their sizes."""

    tasks: tuple[ImportTask, ...]
    files: Mapping[str, int]
    hf_tensors: Mapping[str, tuple[int, ...]]
    """Shapes, in the mapping's order."""
    skipped: Mapping[str, str]
    """HF tensors that are left out, and why."""

    @property
    def read_bytes(self) -> int:
        return sum(run.rows * math.prod(task.shape[1:]) * ITEMSIZE[run.file_dtype] for task in self.tasks for run in task.runs)

    @property
    def written_bytes(self) -> int:
        return sum(self.files.values())


def plan_import(files: HfFiles, mapping: ModelMapping, places: Mapping[str, CheckpointPlace], dtype: str | None) -> ImportPlan:
    """Prove the HF files against the mapping and lay out the checkpoint; `dtype` None keeps each tensor's own.

    MappingError names the tensor that is missing, of another shape, unknown, covered twice or not at all, or of a dtype that cannot
    stand beside that of its neighbours in one megatron-core tensor.
    """
    skipped = files.check(mapping)
    drafts = [_draft(files, name, tensor, places[name], dtype) for name, tensor in mapping.tensors.items()]
    _check_stacks(files.directory, drafts)
    drafts.sort(key=lambda draft: (draft.runs[0].file, draft.runs[0].offset))
    tasks, sizes = _lay_out(drafts)
    for task in tasks:
        rows = [Rectangle(chunk.row0, chunk.row0 + chunk.rows) for chunk in task.chunks]
        prove_tiling(task.name, task.shape[:1], rows, "report this: the plan of the chunks is wrong")
    return ImportPlan(tuple(tasks), sizes, mapping.hf_tensors, skipped)


def _draft(files: HfFiles, name: str, tensor: MappedTensor, place: CheckpointPlace, dtype: str | None) -> ImportTask:
    """The task without its place in a file."""
    runs = []
    for run in tensor.runs:
        header = files.tensors[run.hf_name]
        row_bytes = math.prod(header.shape[1:]) * ITEMSIZE[header.dtype]
        offset = header.offset + run.hf_row0 * row_bytes
        runs.append(SourceRun(run.hf_name, run.hf_row0, run.mcore_row0, run.rows, header.file, offset, header.dtype))
    hf_dtypes = {"BF16" if run.file_dtype == FP8 else run.file_dtype: run.hf_name for run in reversed(runs)}
    if dtype is None and len(hf_dtypes) > 1:
        raise _mixed(files.directory, hf_dtypes, name)
    hf_dtype = dtype or next(iter(hf_dtypes))
    if tensor.in_fp32:
        return ImportTask(name, place, tensor.shape, "F32", next(iter(hf_dtypes)), tuple(runs), "", ())
    return ImportTask(name, place, tensor.shape, hf_dtype, hf_dtype, tuple(runs), "", ())


def _check_stacks(directory: Path, drafts: Iterable[ImportTask]) -> None:
    """A tensor stacked over layers or experts has one dtype."""
    of_key: dict[str, ImportTask] = {}
    for draft in drafts:
        first = of_key.setdefault(draft.place.key, draft)
        if draft.dtype != first.dtype:
            dtypes = {first.dtype: first.runs[0].hf_name, draft.dtype: draft.runs[0].hf_name}
            raise _mixed(directory, dtypes, draft.place.key)


def _mixed(directory: Path, dtypes: Mapping[str, str], name: str) -> MappingError:
    described = " and ".join(f"{hf_name} is {dtype}" for dtype, hf_name in dtypes.items())
    return MappingError(f"{directory}: {described}, and both go into {name}, which has one dtype; convert with --dtype bf16")


def _lay_out(drafts: Iterable[ImportTask]) -> tuple[list[ImportTask], dict[str, int]]:
    tasks: list[ImportTask] = []
    sizes: dict[str, int] = {}
    number = offset = 0
    for draft in drafts:
        if offset >= FILE_BYTES:
            number, offset = number + 1, 0
        file = f"__0_{number}.distcp"
        chunks = []
        for row0, rows in _cut(draft):
            chunk = Chunk(row0, rows, offset)
            offset += draft.stored_bytes(chunk)
            chunks.append(chunk)
        tasks.append(replace(draft, file=file, chunks=tuple(chunks)))
        sizes[file] = offset
    return tasks, sizes


def _cut(task: ImportTask) -> Iterator[tuple[int, int]]:
    """(first row, rows) of the chunks: no chunk holds parts of two HF tensors that simply follow each other, as gate and up do."""
    one_run_each = len({run.hf_name for run in task.runs}) == len(task.runs)
    segments = [run.rows for run in task.runs] if one_run_each else [task.shape[0]]
    row0 = 0
    for segment in segments:
        num_chunks = min(segment, math.ceil(segment * task.row_bytes / CHUNK_BYTES))
        for index in range(num_chunks):
            rows = segment * (index + 1) // num_chunks - segment * index // num_chunks
            yield row0, rows
            row0 += rows
