"""The command inspect: what a checkpoint holds, from its headers alone."""

from __future__ import annotations

import fnmatch
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import typer
from rich.console import Console
from rich.table import Table

from checkpoint_tools.byte_sizes import format_bytes
from checkpoint_tools.errors import reading
from checkpoint_tools.locate import Place, locate
from checkpoint_tools.safe_pickle import DTYPES, Namespace, StoredTensor, load_common, stored_tensors
from checkpoint_tools.spans import ITEMSIZE
from checkpoint_tools.torch_dist import TorchDistReader, TorchDistTensor
from dapo_megatron.types import CheckpointError, MappingError
from dapo_megatron.weights.families import family_of
from dapo_megatron.weights.hf_files import HfFiles

OPTIMIZER = "optimizer"
_FILE_WIDTH = 200
"""Of the table where no terminal limits it."""
_SIZES = (
    *("tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size"),
    *("context_parallel_size", "expert_model_parallel_size", "expert_tensor_parallel_size", "world_size"),
)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor; `pieces` is how many parts it is saved in, `cut` how often each axis is cut, `files` where they are."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    num_bytes: int
    pieces: int
    cut: tuple[int, ...]
    files: tuple[str, ...]

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Report:
    """A checkpoint. `settings`: what it says of the layout it was saved under; `optimizer_bytes`: of state beside the weights."""

    path: str
    kind: str
    family: str | None
    step: int | None
    tensors: tuple[TensorInfo, ...]
    files: Mapping[str, int]
    settings: Mapping[str, int]
    num_optimizer_tensors: int
    optimizer_bytes: int
    objects: tuple[str, ...]

    @property
    def num_parameters(self) -> int:
        """Elements of the model's tensors, padding included."""
        return sum(tensor.num_elements for tensor in self.tensors)

    def as_json(self) -> dict[str, Any]:
        """With the totals."""
        totals = {"num_tensors": len(self.tensors), "num_parameters": self.num_parameters}
        return {**asdict(self), **totals, "num_bytes": sum(tensor.num_bytes for tensor in self.tensors)}


def inspect(path: Path) -> Report:
    """Read the headers of whatever checkpoint lies there. CheckpointError when there is none."""
    place = locate(path)
    match place.kind:
        case "hf":
            return _inspect_hf(place)
        case "torch_dist":
            return _inspect_torch_dist(place)
        case "legacy":
            return _inspect_legacy(place)


def run(path: Path, pattern: str | None, *, as_json: bool) -> None:
    """The command; `pattern` chooses tensors by name."""
    report = inspect(path)
    chosen = tuple(tensor for tensor in report.tensors if pattern is None or fnmatch.fnmatchcase(tensor.name, pattern))
    if pattern is not None and not chosen:
        raise CheckpointError(f"{path} has no tensor whose name fits {pattern!r}; try '*{pattern}*'")
    if as_json:
        typer.echo(json.dumps({**report.as_json(), "tensors": [asdict(tensor) for tensor in chosen]}, indent=1))
    else:
        console = Console(highlight=False)
        if not console.is_terminal:
            console = Console(highlight=False, width=_FILE_WIDTH)
        _print(console, report, chosen)


def _inspect_hf(place: Place) -> Report:
    tensors = [
        TensorInfo(
            name,
            tensor.shape,
            tensor.dtype,
            math.prod(tensor.shape) * ITEMSIZE[tensor.dtype],
            1,
            (1,) * len(tensor.shape),
            (tensor.file,),
        )
        for name, tensor in HfFiles(place.weights).tensors.items()
    ]
    return _report(place, tensors, settings={})


def _inspect_torch_dist(place: Place) -> Report:
    with TorchDistReader(place.weights) as reader:
        of_model = [tensor for tensor in reader.tensors.values() if not _is_optimizer(tensor)]
        of_optimizer = [tensor for tensor in reader.tensors.values() if _is_optimizer(tensor)]
        objects = tuple(reader.objects)
        arguments = reader.common.get("args")
        step = reader.common.get("iteration")
    beside = place.weights.parent / OPTIMIZER
    if place.sealed and beside.is_dir():
        with TorchDistReader(beside) as reader:
            of_optimizer += reader.tensors.values()
    return _report(
        place,
        [_info(tensor) for tensor in of_model],
        settings=_settings(arguments),
        step=step if isinstance(step, int) else None,
        optimizer=of_optimizer,
        objects=objects,
    )


def _inspect_legacy(place: Place) -> Report:
    """The tensors of every rank's file, under the rank's name."""
    tensors, settings, step = [], {}, place.step
    for path in sorted(place.weights.glob("mp_rank_*/*.pt")):
        with reading(path), path.open("rb") as file:
            content = load_common(cast(BinaryIO, file), str(path))
        if not isinstance(content, dict):
            raise CheckpointError(
                f"{path} holds a {type(content).__name__}, must hold Megatron-LM's dict; get the checkpoint again"
            )
        settings = _settings(content.get("args"))
        step = content["iteration"] if isinstance(content.get("iteration"), int) else step
        rank = path.parent.name
        for part in sorted(name for name in content if re.fullmatch(r"model\d*", str(name))):
            tensors += [_stored_info(f"{rank}.{name}", tensor, path) for name, tensor in stored_tensors(content[part], part)]
    return _report(place, tensors, settings=settings, step=step)


def _stored_info(name: str, tensor: StoredTensor, path: Path) -> TensorInfo:
    dtype = DTYPES[tensor.dtype]
    num_bytes = math.prod(tensor.shape) * ITEMSIZE[dtype]
    return TensorInfo(name, tensor.shape, dtype, num_bytes, 1, (1,) * len(tensor.shape), (f"{path.parent.name}/{path.name}",))


def _settings(arguments: Any) -> dict[str, int]:
    recorded = vars(arguments) if isinstance(arguments, Namespace) else {}
    return {name: recorded[name] for name in _SIZES if isinstance(recorded.get(name), int)}


def _report(
    place: Place,
    tensors: list[TensorInfo],
    *,
    settings: Mapping[str, int],
    step: int | None = None,
    optimizer: Sequence[TorchDistTensor] = (),
    objects: tuple[str, ...] = (),
) -> Report:
    files = {str(file.relative_to(place.weights)): file.stat().st_size for file in _files(place)}
    return Report(
        path=str(place.root),
        kind=place.kind,
        family=_family(place),
        step=place.step if place.step is not None else step,
        tensors=tuple(tensors),
        files=files,
        settings=settings,
        num_optimizer_tensors=len(optimizer),
        optimizer_bytes=sum(tensor.num_bytes for tensor in optimizer),
        objects=objects,
    )


def _files(place: Place) -> list[Path]:
    pattern = "mp_rank_*/*" if place.kind == "legacy" else "*"
    return sorted(file for file in place.weights.glob(pattern) if file.is_file())


def _info(tensor: TorchDistTensor) -> TensorInfo:
    cut = tuple(len({chunk.offset[axis] for chunk in tensor.chunks}) for axis in range(len(tensor.shape)))
    files = tuple(sorted({chunk.stored.file for chunk in tensor.chunks}))
    return TensorInfo(tensor.key, tensor.shape, tensor.dtype, tensor.num_bytes, len(tensor.chunks), cut, files)


def _is_optimizer(tensor: TorchDistTensor) -> bool:
    return tensor.key.startswith("optimizer.") or (tensor.key.startswith("chained_") and ".optimizer." in tensor.key)


def _family(place: Place) -> str | None:
    """None where the checkpoint does not say it, or no family has it."""
    try:
        return family_of(place.hf_config()).model_type
    except (CheckpointError, MappingError):
        return None


def _print(console: Console, report: Report, chosen: tuple[TensorInfo, ...]) -> None:
    console.print(f"[bold]{report.path}[/bold]", soft_wrap=True)
    for line in _summary(report):
        console.print(f"  {line}", soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    for heading in ("tensor", "shape", "dtype", "bytes", "pieces", "in"):
        right = heading == "bytes"
        table.add_column(heading, justify="right" if right else "left", overflow="fold", no_wrap=heading != "tensor")
    for tensor in chosen:
        pieces = "1" if tensor.pieces == 1 else f"{tensor.pieces} ({' x '.join(map(str, tensor.cut))})"
        files = tensor.files[0] if len(tensor.files) == 1 else f"{len(tensor.files)} files"
        shape = " x ".join(map(str, tensor.shape)) or "scalar"
        table.add_row(tensor.name, shape, tensor.dtype, format_bytes(tensor.num_bytes), pieces, files)
    console.print(table)
    if len(chosen) < len(report.tensors):
        shown = sum(tensor.num_elements for tensor in chosen)
        console.print(f"{len(chosen)} of {len(report.tensors)} tensors, {shown:,} elements")


def _summary(report: Report) -> Iterator[str]:
    dtypes = Counter[str]()
    for tensor in report.tensors:
        dtypes[tensor.dtype] += tensor.num_elements
    family = report.family or "unknown: no config.json with it"
    yield f"format {report.kind}, family {family}" + ("" if report.step is None else f", step {report.step}")
    by_dtype = ", ".join(f"{count:,} {dtype}" for dtype, count in dtypes.most_common())
    size = format_bytes(sum(tensor.num_bytes for tensor in report.tensors))
    yield f"{len(report.tensors)} tensors, {report.num_parameters:,} parameters ({by_dtype}), {size}"
    yield f"{len(report.files)} files, {format_bytes(sum(report.files.values()))}"
    if report.num_optimizer_tensors:
        yield f"optimizer state: {report.num_optimizer_tensors} tensors, {format_bytes(report.optimizer_bytes)}"
    if report.settings:
        yield "saved under " + ", ".join(f"{name} {value}" for name, value in report.settings.items())
