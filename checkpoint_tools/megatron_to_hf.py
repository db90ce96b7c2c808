"""The command megatron-to-hf: prove, plan the files, copy every tensor to its place in them."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import typer
import xxhash

from checkpoint_tools.byte_sizes import format_bytes
from checkpoint_tools.conversion import Finished, presize, run_conversion
from checkpoint_tools.disk_probe import probe_disks
from checkpoint_tools.errors import writing
from checkpoint_tools.export_worker import MAX_BUFFER_BYTES, ExportTask, ExportWorker
from checkpoint_tools.hf_companions import companion_files, copy_companions
from checkpoint_tools.legacy_layout import RANK_FILE
from checkpoint_tools.locate import Place, locate
from checkpoint_tools.manifest import Manifest, TensorRecord, source_files, write_provenance
from checkpoint_tools.megatron_source import MegatronSource, open_megatron
from checkpoint_tools.model_check import check_model
from checkpoint_tools.output_folder import check_room, check_target, open_output
from checkpoint_tools.readers import open_reader
from checkpoint_tools.safetensors_plan import SafetensorsPlan, TensorSpec, plan_files
from checkpoint_tools.worker_pool import Pool
from dapo_megatron.types import ConfigError
from dapo_megatron.weights.families import family_of
from dapo_megatron.weights.hf_files import INDEX_FILE
from dapo_megatron.weights.hf_headers import TORCH_DTYPES
from dapo_megatron.weights.plan import compile_mapping

_INTERPRETER_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says; sizes in bytes."""

    checkpoint: Path
    out: Path
    hf_config: Path | None
    shard_bytes: int
    num_workers: int | None
    max_memory: int
    dry_run: bool = False
    force: bool = False
    as_json: bool = False


@dataclass(frozen=True, slots=True)
class Summary:
    """What `--json` prints; `seconds` and `peak_memory_bytes` are predictions in a dry run."""

    source: str
    output: str
    model_type: str
    step: int | None
    dry_run: bool
    num_parameters: int
    num_hf_tensors: int
    num_settings_compared: int
    notes: tuple[str, ...]
    files: tuple[str, ...]
    companions: tuple[str, ...]
    num_kept: int
    read_bytes: int
    written_bytes: int
    num_workers: int
    peak_memory_bytes: int
    seconds: float


@dataclass(frozen=True)
class Export:
    """A proven plan: nothing that could be known before reading is wrong any more."""

    place: Place
    hf_dir: Path
    hf_config: Mapping[str, Any]
    source: MegatronSource
    dtypes: Mapping[str, str]
    """Of the exported tensors, as safetensors names them."""
    files: SafetensorsPlan
    num_checked: int
    """Values of config.json that agree with the checkpoint's own record of the model."""

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        return sum(tensor.num_bytes for tensor in self.source.tensors.values())

    def notes(self) -> list[str]:
        """What is left out or changed, a sentence each."""
        notes = [f"left out: {what} ({count} tensors)" for what, count in self.source.left_out.items()]
        notes += [f"cut: {count:,} padding elements of {name}" for name, count in self.source.padding.items()]
        changed = changed_fields(self)
        notes += [
            f"config.json: {name} is {value!r} now" if value is not None else f"config.json: {name} removed"
            for name, value in changed.items()
        ]
        if self.num_checked == 0:
            notes.append(
                "the checkpoint has no record of its model's settings: config.json is checked against tensor shapes alone"
            )
        return notes


def plan_export(checkpoint: Path, hf_dir: Path | None, shard_bytes: int, max_memory: int, num_workers: int | None) -> Export:
    """Find the checkpoint and prove that it holds every tensor of the model. CheckpointError or MappingError when not."""
    place = locate(checkpoint)
    place.require("torch_dist", "legacy")
    hf_config = place.hf_config(hf_dir)
    directory = hf_dir or place.hf_dir
    assert directory is not None  # or hf_config would have raised
    mapping = compile_mapping(hf_config)
    with open_reader(place, max_memory, num_workers) as reader:
        num_checked = check_model(place, reader, hf_config, directory)
        source = open_megatron(reader, mapping)
    dtypes = _exported_dtypes(place, source)
    specs = [TensorSpec(name, tensor.shape, dtypes[name]) for name, tensor in source.tensors.items()]
    return Export(place, directory, hf_config, source, dtypes, plan_files(specs, shard_bytes), num_checked)


def _exported_dtypes(place: Place, source: MegatronSource) -> dict[str, str]:
    """Those that are saved; of a converted checkpoint the original ones, where megatron-core keeps BF16 in F32."""
    manifest = place.manifest()
    before = {} if manifest is None else {name: record.dtype for name, record in manifest.tensors.items()}
    return {
        name: "BF16" if (tensor.dtype, before.get(name)) == ("F32", "BF16") else tensor.dtype
        for name, tensor in source.tensors.items()
    }


def changed_fields(export: Export) -> dict[str, Any]:
    """Fields of config.json that would be wrong about the exported tensors, and their new values; None: to be removed."""
    changed: dict[str, Any] = {}
    bytes_of: Counter[str] = Counter()
    for name, tensor in export.source.tensors.items():
        bytes_of[export.dtypes[name]] += tensor.num_bytes
    dtype = TORCH_DTYPES.get(bytes_of.most_common(1)[0][0])
    for name in ("dtype", "torch_dtype"):
        if name in export.hf_config and dtype is not None and export.hf_config[name] != dtype:
            changed[name] = dtype
    if "quantization_config" in export.hf_config:
        changed["quantization_config"] = None
    return changed


def write_export(export: Export, out: Path, pool: Pool, *, force: bool = False) -> Finished:
    """Write the directory. WriteError when the disk will not have it; what was finished is kept then."""
    with open_output(out, _identity(export), force) as folder:
        tasks = []
        for file in export.files.files:
            path = folder.path / file.name
            with writing(path):
                presize(path, file.num_bytes)
                with path.open("r+b") as handle:
                    handle.write(file.head)
            for name, offset in file.offsets.items():
                tensor = export.source.tensors[name]
                tasks.append(ExportTask(tensor, path, offset, narrow=tensor.dtype != export.dtypes[name]))
        # The largest first, so that no worker is left with one at the end.
        tasks.sort(key=lambda task: -task.num_bytes)
        finished = run_conversion("megatron-to-hf", folder, pool, ExportWorker, tasks)
        with writing(folder.path):
            if export.files.index is not None:
                (folder.path / INDEX_FILE).write_text(export.files.index)
            copy_companions(export.hf_dir, folder.path)
            _mend_config(folder.path / "config.json", changed_fields(export))
            records = {
                name: TensorRecord(tensor.shape, export.dtypes[name], finished.records[name])
                for name, tensor in export.source.tensors.items()
            }
            manifest = Manifest(records)
            manifest.write(folder.path)
            write_provenance(
                folder.path,
                source=str(export.place.root.absolute()),
                source_files=_source_files(export.place),
                hf_config=str(export.hf_dir.absolute()),
                family=family_of(export.hf_config).model_type,
                step=export.place.step,
                fingerprint=manifest.fingerprint(),
            )
        folder.finish()
    return finished


def run(options: Options) -> None:
    """The command. Prints a summary, or one JSON object."""
    check_target(options.out, options.force)
    if options.shard_bytes < 1:
        raise ConfigError([f"--shard-size ({options.shard_bytes}) must be at least 1 byte"])
    export = plan_export(options.checkpoint, options.hf_config, options.shard_bytes, options.max_memory, options.num_workers)
    pool = Pool.choose(options.num_workers, options.max_memory, export.num_bytes)
    written_bytes = sum(file.num_bytes for file in export.files.files)
    check_room(options.out, written_bytes)
    if options.dry_run:
        first = next(span.file for tensor in export.source.tensors.values() for span in tensor.spans)
        seconds = probe_disks(first, options.out).predicted_seconds(export.num_bytes, written_bytes)
        finished = Finished({}, 0, _predicted_memory(pool))
    else:
        start = time.perf_counter()
        finished = write_export(export, options.out, pool, force=options.force)
        seconds = time.perf_counter() - start
    summary = Summary(
        source=str(export.place.root),
        output=str(options.out),
        model_type=family_of(export.hf_config).model_type,
        step=export.place.step,
        dry_run=options.dry_run,
        num_parameters=sum(tensor.num_bytes // tensor.itemsize for tensor in export.source.tensors.values()),
        num_hf_tensors=len(export.source.tensors),
        num_settings_compared=export.num_checked,
        notes=tuple(export.notes()),
        files=tuple(file.name for file in export.files.files),
        companions=tuple(str(name) for name in companion_files(export.hf_dir)),
        num_kept=finished.num_kept,
        read_bytes=export.num_bytes,
        written_bytes=written_bytes,
        num_workers=pool.num_workers,
        peak_memory_bytes=finished.peak_memory_bytes,
        seconds=round(seconds, 2),
    )
    _show(summary, options.as_json)


def _predicted_memory(pool: Pool) -> int:
    buffers = min(MAX_BUFFER_BYTES, pool.memory_per_worker)
    return pool.num_workers * (buffers + _INTERPRETER_BYTES) + _INTERPRETER_BYTES


def _show(summary: Summary, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(asdict(summary), indent=1))
        return
    step = "" if summary.step is None else f", step {summary.step}"
    files = "1 file" if len(summary.files) == 1 else f"{len(summary.files)} files"
    rows = [
        ("model", f"{summary.model_type}, {summary.num_parameters:,} parameters in {summary.num_hf_tensors} HF tensors{step}"),
        ("proof", f"each element saved once; {summary.num_settings_compared} recorded settings agree with config.json"),
        *(("note", note) for note in summary.notes),
        ("reads", f"{format_bytes(summary.read_bytes)} from {summary.source}"),
        (
            "writes",
            f"{format_bytes(summary.written_bytes)} in {files} to {summary.output}, {len(summary.companions)} files beside them",
        ),
    ]
    if summary.num_kept:
        rows.append(("resumed", f"{summary.num_kept} of {summary.num_hf_tensors} HF tensors were there and in order"))
    rows.append(
        (
            "memory",
            f"{format_bytes(summary.peak_memory_bytes)} at most, {summary.num_workers} workers and all interpreters together",
        )
    )
    if summary.dry_run:
        rows.append(("time", f"about {summary.seconds:.0f} s by a short probe of the disk; nothing was written"))
    else:
        rows.append(("time", f"{summary.seconds:.1f} s, {format_bytes(summary.written_bytes / summary.seconds)}/s"))
    for name, text in rows:
        typer.echo(f"{name:>10}  {text}")


def _identity(export: Export) -> dict[str, Any]:
    """What unfinished work must have in common with this command to be continued."""
    return {
        "command": "megatron-to-hf",
        "source": str(export.place.root.absolute()),
        "source_files": _source_files(export.place),
        "config": xxhash.xxh3_64_hexdigest(json.dumps(export.hf_config, sort_keys=True).encode()),
        "files": [[file.name, xxhash.xxh3_64_hexdigest(file.head)] for file in export.files.files],
    }


def _source_files(place: Place) -> list[dict[str, Any]]:
    pattern = f"*/{RANK_FILE}" if place.kind == "legacy" else "*"
    return source_files(sorted(file for file in place.weights.glob(pattern) if file.is_file()), place.weights)


def _mend_config(file: Path, changed: Mapping[str, Any]) -> None:
    if changed:
        config = json.loads(file.read_text()) | changed
        config = {name: value for name, value in config.items() if value is not None or name not in changed}
        file.write_text(json.dumps(config, indent=2) + "\n")
