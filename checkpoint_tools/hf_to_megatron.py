"""The command hf-to-megatron: plan, prove, write, and say what was done.

    OUT_DIR/latest_checkpointed_iteration.txt   "release"
    OUT_DIR/release/                            torch_dist, see torch_dist_files.py
    OUT_DIR/hf/                                 config.json, tokenizer and whatever else lies beside the HF weights
    OUT_DIR/manifest.json, provenance.json      manifest.py

Layers are stacked under one key where Megatron-LM stacks them, and names are those of the TransformerEngine layer spec, which
megatron-core's local spec asks for as well. The vocabulary is not padded: megatron-core pads while it loads.
"""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import typer

from checkpoint_tools.byte_sizes import count, format_bytes
from checkpoint_tools.conversion import Finished, presize, run_conversion
from checkpoint_tools.disk_probe import probe_disks
from checkpoint_tools.errors import writing
from checkpoint_tools.hf_companions import COMPANIONS, CONFIG_FILE, copy_companions, read_hf_config
from checkpoint_tools.import_plan import ImportPlan, ImportTask, plan_import
from checkpoint_tools.import_worker import BUFFER_BYTES, ImportWorker
from checkpoint_tools.manifest import RELEASE, TRACKER_FILE, Manifest, TensorRecord, source_files, write_provenance
from checkpoint_tools.output_folder import OutputFolder, check_room, check_target, open_output
from checkpoint_tools.torch_dist_files import (
    StoredChunk,
    StoredTensor,
    extra_state_objects,
    write_common_state,
    write_metadata,
)
from checkpoint_tools.worker_pool import Pool
from dapo_megatron.weights.checkpoint_keys import checkpoint_places
from dapo_megatron.weights.families import family_of, megatron_arguments
from dapo_megatron.weights.file_digest import digest_file
from dapo_megatron.weights.hf_files import HfFiles
from dapo_megatron.weights.plan import compile_mapping

_INTERPRETER_BYTES = 60 * 10**6
_TORCH_BYTES = 550 * 10**6
"""Resident sets of a process, without and with torch, which workers need to change dtypes."""


@dataclass(frozen=True, slots=True)
class Options:
    """The command line."""

    hf_dir: Path
    out_dir: Path
    dtype: Literal["keep", "bf16"]
    num_workers: int | None
    max_memory: int
    dry_run: bool
    force: bool
    as_json: bool


@dataclass(frozen=True, slots=True)
class Summary:
    """What was done, or would be: the JSON of --json. Seconds are predicted in a dry run."""

    source: str
    output: str
    model_type: str
    dry_run: bool
    num_parameters: int
    num_hf_tensors: int
    num_megatron_tensors: int
    num_kept: int
    """Megatron-core tensors found finished by an earlier run."""
    num_files: int
    read_bytes: int
    written_bytes: int
    num_workers: int
    peak_memory_bytes: int
    seconds: float
    skipped: Mapping[str, str]
    fingerprint: str | None
    """Of the manifest."""


def run(options: Options) -> None:
    """Convert, or with `dry_run` say what would happen. CheckpointError, MappingError and ConfigError before anything is written."""
    start = time.perf_counter()
    check_target(options.out_dir, options.force)
    config = read_hf_config(options.hf_dir)
    arguments = checkpoint_arguments(config)
    mapping = compile_mapping(config)
    places = checkpoint_places(mapping, stacked_layers=stacks_layers(arguments))
    plan = plan_import(HfFiles(options.hf_dir), mapping, places, None if options.dtype == "keep" else "BF16")
    check_room(options.out_dir, plan.written_bytes)
    pool = Pool.choose(options.num_workers, options.max_memory, plan.written_bytes)
    if options.dry_run:
        rates = probe_disks(options.hf_dir / plan.tasks[0].runs[0].file, options.out_dir)
        seconds = rates.predicted_seconds(plan.read_bytes, plan.written_bytes)
        memory = _predicted_memory(plan, pool)
        _show(_summary(options, config, plan, pool, Finished({}, 0, memory), seconds, None), options.as_json)
        return
    with open_output(options.out_dir, _identity(options, plan), options.force) as folder:
        finished, fingerprint = _write(options, folder, config, arguments, plan, pool)
        folder.finish()
    seconds = time.perf_counter() - start
    _show(_summary(options, config, plan, pool, finished, seconds, fingerprint), options.as_json)


def checkpoint_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """The model as Megatron-LM's arguments, and what its loader asks the checkpoint's arguments about."""
    arguments = megatron_arguments(config)
    return arguments | {
        "padded_vocab_size": arguments["vocab_size"],
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "ckpt_format": "torch_dist",
        "no_save_optim": True,
        "no_save_rng": True,
    }


def stacks_layers(arguments: Mapping[str, Any]) -> bool:
    """Whether megatron-core 0.19.2 saves the layers of this model stacked: not when MoE layers are picked by a list or a stride."""
    frequency = arguments.get("moe_layer_freq", 1)
    return not isinstance(frequency, list) and frequency in (None, 1)


def _identity(options: Options, plan: ImportPlan) -> dict[str, Any]:
    """What a resumed conversion must have in common with the one before."""
    names = sorted({run.file for task in plan.tasks for run in task.runs})
    return {
        "command": "hf-to-megatron",
        "source": str(options.hf_dir.resolve()),
        "dtype": options.dtype,
        "files": source_files([options.hf_dir / name for name in (CONFIG_FILE, *names)], options.hf_dir),
    }


def _write(
    options: Options, folder: OutputFolder, config: Mapping[str, Any], arguments: Mapping[str, Any], plan: ImportPlan, pool: Pool
) -> tuple[Finished, str]:
    """Fill the output folder; the fingerprint of its manifest."""
    release = folder.path / RELEASE
    with writing(folder.path):
        for name, num_bytes in plan.files.items():
            presize(release / name, num_bytes)
    make_worker = partial(ImportWorker, options.hf_dir.resolve(), release.resolve())
    finished = run_conversion(f"{options.hf_dir.name} -> torch_dist", folder, pool, make_worker, plan.tasks)
    hashes = {name: xxh3 for record in finished.records.values() for name, xxh3 in record.items()}
    manifest = Manifest(_tensor_records(plan, hashes), plan.skipped)
    with writing(folder.path):
        _write_state(release, plan, arguments)
        (folder.path / TRACKER_FILE).write_text(RELEASE)
        companions = copy_companions(options.hf_dir, folder.path / COMPANIONS)
        manifest.write(folder.path)
        write_provenance(
            folder.path,
            source=str(options.hf_dir.resolve()),
            source_files=_identity(options, plan)["files"],
            config_xxh3=digest_file(options.hf_dir / CONFIG_FILE).xxh3,
            model_type=family_of(config).model_type,
            layout="torch_dist",
            dtype=options.dtype,
            companions=companions,
            fingerprint=manifest.fingerprint(),
        )
    return finished, manifest.fingerprint()


def _tensor_records(plan: ImportPlan, hashes: Mapping[str, str]) -> dict[str, TensorRecord]:
    dtypes = {run.hf_name: task.hf_dtype for task in plan.tasks for run in task.runs}
    return {name: TensorRecord(shape, dtypes[name], hashes[name]) for name, shape in plan.hf_tensors.items()}


def _write_state(release: Path, plan: ImportPlan, arguments: Mapping[str, Any]) -> None:
    """What belongs to the checkpoint beside the tensors' bytes."""
    of_key: dict[str, list[ImportTask]] = defaultdict(list)
    for task in plan.tasks:
        of_key[task.place.key].append(task)
    tensors = [
        StoredTensor(
            key,
            (*tasks[0].place.axes, *tasks[0].shape),
            tasks[0].dtype,
            [
                StoredChunk(task.file, chunk.offset, task.stored_bytes(chunk), task.chunk_offset(chunk), task.chunk_shape(chunk))
                for task in tasks
                for chunk in task.chunks
            ],
        )
        for key, tasks in of_key.items()
    ]
    objects = extra_state_objects([task.place for task in plan.tasks])
    write_metadata(release, tensors, objects, f"__0_{len(plan.files)}.distcp")
    write_common_state(release, arguments)


def _predicted_memory(plan: ImportPlan, pool: Pool) -> int:
    casts = any(not task.is_plain(run) for task in plan.tasks for run in task.runs)
    buffers = pool.max_memory if casts else pool.num_workers * min(BUFFER_BYTES, pool.memory_per_worker)
    return buffers + (pool.num_workers + 1) * _INTERPRETER_BYTES + pool.num_workers * casts * _TORCH_BYTES


def _summary(
    options: Options,
    config: Mapping[str, Any],
    plan: ImportPlan,
    pool: Pool,
    finished: Finished,
    seconds: float,
    fingerprint: str | None,
) -> Summary:
    return Summary(
        source=str(options.hf_dir),
        output=str(options.out_dir),
        model_type=config["model_type"],
        dry_run=options.dry_run,
        num_parameters=sum(math.prod(shape) for shape in plan.hf_tensors.values()),
        num_hf_tensors=len(plan.hf_tensors),
        num_megatron_tensors=len(plan.tasks),
        num_kept=finished.num_kept,
        num_files=len(plan.files),
        read_bytes=plan.read_bytes,
        written_bytes=plan.written_bytes,
        num_workers=pool.num_workers,
        peak_memory_bytes=finished.peak_memory_bytes,
        seconds=round(seconds, 2),
        skipped=plan.skipped,
        fingerprint=fingerprint,
    )


def _show(summary: Summary, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(asdict(summary), indent=1))
        return
    is_done = not summary.dry_run
    time_taken = f"{summary.seconds:.1f} s, {format_bytes(summary.written_bytes / summary.seconds)}/s"
    time_predicted = f"about {summary.seconds:.0f} s by a short probe of the disk; nothing was written"
    left_out = [
        ("left out", f"{first}{f' and {number - 1} more' if number > 1 else ''}: {reason}")
        for reason, (number, first) in _skipped_by_reason(summary.skipped).items()
    ]
    lines = [
        (
            "model",
            f"{summary.model_type}, {summary.num_parameters:,} parameters in {summary.num_hf_tensors} HF tensors, each mapped once",
        ),
        *left_out,
        ("reads", f"{format_bytes(summary.read_bytes)} from {summary.source}"),
        ("writes", f"{format_bytes(summary.written_bytes)} in {count(summary.num_files, 'file')} to {summary.output}"),
        ("resumed", f"{summary.num_kept} of {summary.num_megatron_tensors} megatron-core tensors were there and in order"),
        (
            "memory",
            f"{format_bytes(summary.peak_memory_bytes)} at most, {count(summary.num_workers, 'worker')} and all interpreters together",
        ),
        ("time", time_taken if is_done else time_predicted),
        ("load with", f"--load {summary.output} --use-checkpoint-args (Megatron-LM), or {summary.output}/{RELEASE}"),
    ]
    hidden = {"resumed": not summary.num_kept, "load with": summary.dry_run}
    for name, text in lines:
        if not hidden.get(name):
            typer.echo(f"{name:>10}  {text}")


def _skipped_by_reason(skipped: Mapping[str, str]) -> dict[str, tuple[int, str]]:
    """Reason -> (how many tensors, the first of them)."""
    reasons: dict[str, tuple[int, str]] = {}
    for name, reason in skipped.items():
        count, first = reasons.get(reason, (0, name))
        reasons[reason] = (count + 1, first)
    return reasons
