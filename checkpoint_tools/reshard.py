"""The command reshard: a legacy Megatron-LM checkpoint, one file a rank, under another layout.

OUT_DIR/latest_checkpointed_iteration.txt             as of the source
OUT_DIR/iter_NNNNNNN/mp_rank_*/model_optim_rng.pt     args, checkpoint_version, iteration and the rank's models
OUT_DIR/hf/                                           where the source has it
OUT_DIR/manifest.json, provenance.json                xxh3-128 of every rank's tensors; where it all came from
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import typer
import xxhash

from checkpoint_tools.byte_sizes import count, format_bytes
from checkpoint_tools.conversion import Finished, presize, run_conversion
from checkpoint_tools.disk_probe import probe_disks
from checkpoint_tools.errors import writing
from checkpoint_tools.export_worker import MAX_BUFFER_BYTES, ExportTask, ExportWorker
from checkpoint_tools.hf_companions import COMPANIONS, copy_companions
from checkpoint_tools.legacy_layout import EMBEDDING, RANK_FILE, Layout, deal_layers
from checkpoint_tools.legacy_plan import RankFile, check_divides, padded_size, plan_rank_files
from checkpoint_tools.legacy_reader import LegacyReader, check_replicas
from checkpoint_tools.locate import Place, locate
from checkpoint_tools.manifest import RELEASE, TRACKER_FILE, Manifest, TensorRecord, source_files, write_provenance
from checkpoint_tools.output_folder import check_room, check_target, open_output
from checkpoint_tools.pickle_writer import Instance, Name
from checkpoint_tools.safe_pickle import DtypeName
from checkpoint_tools.worker_pool import Pool
from dapo_megatron.types import CheckpointError, ConfigError

_DIVISIBLE_BY = 128
"""Megatron-LM's default of --make-vocab-size-divisible-by."""
_KEPT = ("checkpoint_version", "iteration", "num_floating_point_operations_so_far")
_LEFT_OUT = {
    "optimizer": "optimizer state",
    "opt_param_scheduler": "the scheduler's state",
    "rng_state": "random streams",
    "rerun_state_machine": "the state of re-runs",
}
"""What ranks have beside the model and cannot be dealt out anew -> what to call it."""
_INTERPRETER_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says; sizes in bytes. None: as in the checkpoint, layers equally dealt."""

    checkpoint: Path
    out: Path
    tensor: int | None
    pipeline: int | None
    virtual_pipeline: int | None
    expert: int | None
    expert_tensor: int | None
    layers_per_stage: tuple[int, ...] | None
    vocab_size: int | None
    divisible_by: int | None
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
    dry_run: bool
    from_layout: str
    to_layout: str
    layers_per_stage: tuple[int, ...]
    num_parameters: int
    num_tensors: int
    num_copies_compared: int
    notes: tuple[str, ...]
    num_files: int
    num_kept: int
    read_bytes: int
    written_bytes: int
    num_workers: int
    peak_memory_bytes: int
    seconds: float
    load_with: str


@dataclass(frozen=True)
class _Plan:
    place: Place
    reader: LegacyReader
    layout: Layout
    files: list[RankFile]
    notes: tuple[str, ...]
    iteration_folder: str

    @property
    def written_bytes(self) -> int:
        return sum(file.archive.num_bytes for file in self.files)

    @property
    def read_bytes(self) -> int:
        return sum(tensor.num_bytes for file in self.files for tensor in file.tensors)

    @property
    def num_parameters(self) -> int:
        """Without the new padding."""
        whole = (tensor for tensor in self.reader.tensors.values() if tensor.chunks)
        return sum(math.prod(tensor.shape) for tensor in whole)


def run(options: Options) -> None:
    """Reshard, or with `dry_run` say what would happen. CheckpointError, MappingError and ConfigError before anything is written."""
    start = time.perf_counter()
    check_target(options.out, options.force)
    plan = _plan(options)
    pool = Pool.choose(options.num_workers, options.max_memory, plan.written_bytes)
    check_room(options.out, plan.written_bytes)
    num_copies = check_replicas(plan.reader, options.max_memory, options.num_workers)
    if options.dry_run:
        first = next(span.file for file in plan.files for tensor in file.tensors for span in tensor.spans)
        seconds = probe_disks(first, options.out).predicted_seconds(plan.read_bytes, plan.written_bytes)
        buffers = min(MAX_BUFFER_BYTES, pool.memory_per_worker)
        finished = Finished({}, 0, pool.num_workers * (buffers + _INTERPRETER_BYTES) + _INTERPRETER_BYTES)
    else:
        finished = _write(plan, options, pool)
        seconds = time.perf_counter() - start
    _show(_summary(options, plan, pool, finished, num_copies, seconds), options.as_json)


def _plan(options: Options) -> _Plan:
    place = locate(options.checkpoint)
    if place.kind == "torch_dist":
        raise CheckpointError(
            f"{place.root} is a torch_dist checkpoint, which loads under any layout as it is: there is nothing to reshard; "
            "give it to Megatron-LM's --load"
        )
    place.require("legacy")
    reader = LegacyReader(place.weights)
    layout = _layout(options, reader)
    check_divides(reader, layout)
    padded_vocab, note = _padded_vocabulary(options, reader, layout)
    arguments, dropped = _arguments(reader, layout, padded_vocab, options)
    common = {"args": Instance(Name("argparse", "Namespace"), arguments)}
    common |= {name: reader.common[name] for name in _KEPT if name in reader.common and _is_plain(reader.common[name])}
    files = plan_rank_files(reader, layout, padded_vocab, common)
    notes = [f"left out: {what}" for name, what in _LEFT_OUT.items() if name in reader.keys]
    if any(place.weights.glob("mp_rank_*/distrib_optim.pt")):
        notes.append("left out: the distributed optimizer's state (distrib_optim.pt)")
    if note:
        notes.append(note)
    if dropped:
        notes.append(f"left out of args: {', '.join(dropped)}, which are no plain values")
    if reader.objects:
        notes.append("emptied: TransformerEngine's scaling state (_extra_state)")
    return _Plan(place, reader, layout, files, tuple(notes), _iteration_folder(place, reader))


def _layout(options: Options, reader: LegacyReader) -> Layout:
    """The one asked for; what is not asked for stays as it is."""
    old = reader.layout
    stages = options.pipeline
    if stages is None:
        stages = old.pipeline if options.layers_per_stage is None else len(options.layers_per_stage)
    kept_chunks = old.num_chunks if stages == old.pipeline else 1
    num_chunks = kept_chunks if options.virtual_pipeline is None else options.virtual_pipeline
    layers_per_stage = options.layers_per_stage
    if layers_per_stage is None and stages == old.pipeline:
        if num_chunks == old.num_chunks:
            layers = old.layers
        else:
            layers = deal_layers(old.num_layers, stages, num_chunks, [sum(stage) for stage in old.layers])
    else:
        layers = deal_layers(old.num_layers, stages, num_chunks, layers_per_stage)
    tensor = old.tensor if options.tensor is None else options.tensor
    kept = tensor if old.expert_tensor == old.tensor else old.expert_tensor
    expert_tensor = kept if options.expert_tensor is None else options.expert_tensor
    return Layout(tensor, old.expert if options.expert is None else options.expert, expert_tensor, layers)


def _padded_vocabulary(options: Options, reader: LegacyReader, layout: Layout) -> tuple[int, str | None]:
    """Rows of the embedding with padding, and what to say of it."""
    divisible_by = _divisible_by(options, reader)
    if divisible_by < 1:
        raise ConfigError([f"--make-vocab-size-divisible-by ({divisible_by}) must be at least 1"])
    rows = reader.tensors[EMBEDDING].shape[0]
    size = options.vocab_size or reader.argument("vocab_size")
    if size is None:
        padded = padded_size(rows, divisible_by, layout)
        said = "" if padded == rows else f", {count(padded - rows, 'row')} of zeros added"
        return padded, f"vocabulary: {rows:,} rows are kept, padding or not{said}; --vocab-size tells how many are no padding"
    if not 0 < size <= rows:
        raise ConfigError([f"--vocab-size ({size}) must be in 1..{rows}, the rows of the embedding"])
    padded = padded_size(size, divisible_by, layout)
    if padded == rows:
        return padded, None
    change = f"{count(rows - padded, 'row')} of padding cut" if padded < rows else f"{count(padded - rows, 'row')} of zeros added"
    return padded, f"vocabulary: {size:,} tokens padded to {padded:,} rows, {rows:,} before: {change}"


def _divisible_by(options: Options, reader: LegacyReader) -> int:
    given = options.divisible_by
    return int(reader.argument("make_vocab_size_divisible_by", _DIVISIBLE_BY)) if given is None else given


def _arguments(reader: LegacyReader, layout: Layout, padded_vocab: int, options: Options) -> tuple[dict[str, Any], list[str]]:
    """Megatron-LM's arguments under the new layout, as `pickle_writer` takes them, and the names of those that it cannot."""
    recorded = vars(reader.common["args"])
    plain = {name: _written(value) for name, value in recorded.items() if _is_plain(value)}
    chunks, stages = layout.num_chunks, layout.pipeline
    per_stage = _layers_per_stage(layout)
    is_even = len(set(per_stage)) == 1
    changed = {
        "tensor_model_parallel_size": layout.tensor,
        "pipeline_model_parallel_size": stages,
        "transformer_pipeline_model_parallel_size": stages,
        "virtual_pipeline_model_parallel_size": chunks if chunks > 1 else None,
        "num_virtual_stages_per_pipeline_rank": chunks if chunks > 1 else None,
        "num_layers_per_virtual_pipeline_stage": per_stage[0] // chunks if chunks > 1 and is_even else None,
        "expert_model_parallel_size": layout.expert,
        "expert_tensor_parallel_size": layout.expert_tensor,
        "decoder_first_pipeline_num_layers": None if is_even else per_stage[0],
        "decoder_last_pipeline_num_layers": None if is_even else per_stage[-1],
        "pipeline_model_parallel_layout": None if _is_regular(layout) else _layout_string(layout),
        "account_for_embedding_in_pipeline_split": False,
        "account_for_loss_in_pipeline_split": False,
        "padded_vocab_size": padded_vocab,
        "make_vocab_size_divisible_by": _divisible_by(options, reader),
    }
    if not _is_regular(layout):
        changed |= {"decoder_first_pipeline_num_layers": None, "decoder_last_pipeline_num_layers": None}
    return plain | changed, sorted(recorded.keys() - plain.keys() - changed.keys())


def _layers_per_stage(layout: Layout) -> list[int]:
    return [sum(stage) for stage in layout.layers]


def _is_regular(layout: Layout) -> bool:
    """Whether only the first and the last stage differ from the others, for which Megatron-LM has arguments."""
    return len(set(layout.layers[1:-1])) <= 1 and all(len(set(stage)) == 1 for stage in layout.layers)


def _layout_string(layout: Layout) -> str:
    """Megatron-LM's --pipeline-model-parallel-layout: E embedding, t a layer, L the loss; chunk 0 of all stages first."""
    parts = ["t" * stage[chunk] for chunk in range(layout.num_chunks) for stage in layout.layers]
    parts[0], parts[-1] = f"E{parts[0]}", f"{parts[-1]}L"
    return "|".join(parts)


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    return value is None or isinstance(value, bool | int | float | str)


def _written(value: Any) -> Any:
    """A plain value as `pickle_writer` takes it: a dtype is torch's."""
    if isinstance(value, DtypeName):
        return Name("torch", str(value))
    if isinstance(value, list | tuple):
        return type(value)(map(_written, value))
    if isinstance(value, dict):
        return {key: _written(item) for key, item in value.items()}
    return value


def _iteration_folder(place: Place, reader: LegacyReader) -> str:
    if place.step is not None or place.weights.name == RELEASE:
        return place.weights.name
    iteration = reader.common.get("iteration")
    return f"iter_{iteration:07d}" if isinstance(iteration, int) else RELEASE


def _write(plan: _Plan, options: Options, pool: Pool) -> Finished:
    with open_output(options.out, _identity(plan), options.force) as folder:
        tasks = []
        for file in plan.files:
            path = folder.path / plan.iteration_folder / file.folder / RANK_FILE
            with writing(path):
                presize(path, file.archive.num_bytes)
                with path.open("r+b") as handle:
                    for offset, content in file.archive.pieces:
                        handle.seek(offset)
                        handle.write(content)
            tasks += [
                ExportTask(tensor, path, start)
                for tensor, start in zip(file.tensors, file.archive.starts, strict=True)
                if tensor.num_bytes
            ]
        # The largest first, so that no worker is left with one at the end.
        tasks.sort(key=lambda task: -task.num_bytes)
        finished = run_conversion("reshard", folder, pool, ExportWorker, tasks)
        records = {
            task.name: TensorRecord(task.tensor.shape, task.tensor.dtype, finished.records[task.name])
            for task in sorted(tasks, key=lambda task: task.name)
        }
        with writing(folder.path):
            tracker = plan.iteration_folder.removeprefix("iter_")
            (folder.path / TRACKER_FILE).write_text(str(int(tracker)) if tracker.isdecimal() else tracker)
            if plan.place.hf_dir is not None:
                copy_companions(plan.place.hf_dir, folder.path / COMPANIONS)
            manifest = Manifest(records)
            manifest.write(folder.path)
            write_provenance(
                folder.path,
                source=str(plan.place.root.absolute()),
                source_files=_identity(plan)["source_files"],
                from_layout=str(plan.reader.layout),
                layout=str(plan.layout),
                layers_per_stage=_layers_per_stage(plan.layout),
                notes=plan.notes,
                fingerprint=manifest.fingerprint(),
            )
        folder.finish()
    return finished


def _identity(plan: _Plan) -> dict[str, Any]:
    """What unfinished work must have in common with this command to be continued."""
    return {
        "command": "reshard",
        "source": str(plan.place.root.absolute()),
        "source_files": source_files(sorted(plan.place.weights.glob(f"*/{RANK_FILE}")), plan.place.weights),
        "layout": [str(plan.layout), plan.layout.layers],
        "files": [[file.folder, xxhash.xxh3_64_hexdigest(b"".join(c for _, c in file.archive.pieces))] for file in plan.files],
    }


def _summary(options: Options, plan: _Plan, pool: Pool, finished: Finished, num_copies: int, seconds: float) -> Summary:
    return Summary(
        source=str(plan.place.root),
        output=str(options.out),
        dry_run=options.dry_run,
        from_layout=str(plan.reader.layout),
        to_layout=str(plan.layout),
        layers_per_stage=tuple(_layers_per_stage(plan.layout)),
        num_parameters=plan.num_parameters,
        num_tensors=sum(len(file.tensors) for file in plan.files),
        num_copies_compared=num_copies,
        notes=plan.notes,
        num_files=len(plan.files),
        num_kept=finished.num_kept,
        read_bytes=plan.read_bytes,
        written_bytes=plan.written_bytes,
        num_workers=pool.num_workers,
        peak_memory_bytes=finished.peak_memory_bytes,
        seconds=round(seconds, 2),
        load_with=_load_with(options, plan),
    )


def _load_with(options: Options, plan: _Plan) -> str:
    """Megatron-LM's arguments."""
    layout, per_stage = plan.layout, _layers_per_stage(plan.layout)
    words = ["--load", str(options.out), "--ckpt-format torch", "--no-load-optim --no-load-rng"]
    words += [f"--tensor-model-parallel-size {layout.tensor}", f"--pipeline-model-parallel-size {layout.pipeline}"]
    if not _is_regular(layout):
        words.append(f"--pipeline-model-parallel-layout '{_layout_string(layout)}'")
    elif len(set(per_stage)) > 1:
        words.append(f"--decoder-first-pipeline-num-layers {per_stage[0]} --decoder-last-pipeline-num-layers {per_stage[-1]}")
    if layout.num_chunks > 1 and _is_regular(layout):
        words.append(f"--num-virtual-stages-per-pipeline-rank {layout.num_chunks}")
    if plan.reader.argument("num_experts") is not None:
        words += [f"--expert-model-parallel-size {layout.expert}", f"--expert-tensor-parallel-size {layout.expert_tensor}"]
    return " ".join(words)


def _show(summary: Summary, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(asdict(summary), indent=1))
        return
    stages = ", ".join(map(str, summary.layers_per_stage))
    rows = [
        ("layout", f"{summary.from_layout} -> {summary.to_layout}, layers of the stages: {stages}"),
        ("proof", f"each element saved once; {summary.num_copies_compared:,} copies on other ranks are equal"),
        *(("note", note) for note in summary.notes),
        ("reads", f"{summary.num_parameters:,} parameters from {summary.source}"),
        ("writes", f"{format_bytes(summary.written_bytes)} in {count(summary.num_files, 'file')} to {summary.output}"),
    ]
    if summary.num_kept:
        rows.append(("resumed", f"{summary.num_kept} of {summary.num_tensors} tensors of ranks were there and in order"))
    workers = count(summary.num_workers, "worker")
    rows.append(("memory", f"{format_bytes(summary.peak_memory_bytes)} at most, {workers} and all interpreters together"))
    if summary.dry_run:
        rows.append(("time", f"about {summary.seconds:.0f} s by a short probe of the disk; nothing was written"))
    else:
        rows.append(("time", f"{summary.seconds:.1f} s, {format_bytes(summary.written_bytes / summary.seconds)}/s"))
        rows.append(("load with", summary.load_with))
    for name, text in rows:
        typer.echo(f"{name:>10}  {text}")
