"""The command verify: two checkpoints, each Hugging Face or Megatron, compared tensor by tensor in Hugging Face's layout."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import typer
from rich.console import Console

from checkpoint_tools.byte_sizes import format_bytes
from checkpoint_tools.comparison import CompareTask, CompareWorker, Comparison, HfRows, Rows, SpanRows
from checkpoint_tools.hf_companions import read_hf_config
from checkpoint_tools.locate import Place, locate
from checkpoint_tools.logits import LogitsComparison, check_size, compare_logits, logits_of, sample_sequences
from checkpoint_tools.manifest import Manifest
from checkpoint_tools.megatron_source import open_megatron
from checkpoint_tools.model_check import check_model
from checkpoint_tools.progress import progress_bar
from checkpoint_tools.readers import open_reader
from checkpoint_tools.spans import SpanTensor, whole_span
from checkpoint_tools.worker_pool import Pool, run_tasks
from dapo_megatron.launcher.run_folder import actor_digests
from dapo_megatron.types import CheckpointError, MappingError
from dapo_megatron.weights.codecs import FP8, scale_name
from dapo_megatron.weights.file_digest import digest_file
from dapo_megatron.weights.hf_files import HfFiles
from dapo_megatron.weights.plan import ModelMapping, compile_mapping

_MAX_LINES = 20


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says; sizes in bytes."""

    a: Path
    b: Path
    hf_config: Path | None
    num_workers: int | None
    max_memory: int
    logits: bool = False
    as_json: bool = False


@dataclass(frozen=True)
class Side:
    """One of the two checkpoints: its tensors by HF name, and the manifest that lies beside it.

    `dispensable`: tensors that the model does not need, and why; `left_out`: what is in the files and is no tensor of a model.
    """

    place: Place
    tensors: Mapping[str, Rows]
    dispensable: Mapping[str, str]
    left_out: Mapping[str, int]
    manifest: Manifest | None


@dataclass(frozen=True)
class Verdict:
    """`problems` maps a tensor or file to a sentence; empty when all is equal."""

    num_equal: int
    num_bytes: int
    problems: Mapping[str, str]
    not_compared: Mapping[str, str]
    num_in_manifests: int
    """Hashes that a manifest or marker has of what was read, and that agree."""
    comparisons: Mapping[str, Comparison]


def open_sides(a: Path, b: Path, hf_config: Path | None, max_memory: int, num_workers: int | None) -> tuple[Side, Side]:
    """Find both; a Megatron side that does not know its model takes the config.json of the other."""
    places = locate(a), locate(b)
    for place in places:
        place.require("hf", "torch_dist", "legacy")
    known = [hf_config, *(place.hf_dir for place in places)]
    fallback = next((folder for folder in known if folder is not None), None)
    raw = all(place.kind == "hf" for place in places)
    first, second = (
        _open_hf(place, raw)
        if place.kind == "hf"
        else _open_megatron_side(place, hf_config or place.hf_dir or fallback, max_memory, num_workers)
        for place in places
    )
    return first, second


def compare(a: Side, b: Side, pool: Pool) -> Verdict:
    """Read everything and compare."""
    problems: dict[str, str] = {}
    not_compared: dict[str, str] = {}
    for here, there, letter in ((a, b, "A"), (b, a, "B")):
        for name in here.tensors.keys() - there.tensors.keys():
            if name in here.dispensable:
                not_compared[name] = here.dispensable[name]
            else:
                problems[name] = f"is only in {letter}, {here.place.root}"
    tasks = []
    for name in sorted(a.tensors.keys() & b.tensors.keys()):
        if a.tensors[name].shape != b.tensors[name].shape:
            problems[name] = f"has shape {a.tensors[name].shape} in A, {b.tensors[name].shape} in B"
        else:
            tasks.append(CompareTask(name, a.tensors[name], b.tensors[name]))
    tasks.sort(key=lambda task: -task.num_bytes)
    comparisons = {}
    with progress_bar("verify", sum(task.num_bytes for task in tasks)) as report:
        for done in run_tasks(pool, CompareWorker, tasks, {}, report):
            comparisons[done.name] = Comparison(**done.record)
    num_in_manifests = 0
    for name, comparison in comparisons.items():
        if problem := _sentence(comparison, a.tensors[name].dtype, b.tensors[name].dtype):
            problems[name] = problem
        for side, letter, found in ((a, "A", comparison.xxh3_a), (b, "B", comparison.xxh3_b)):
            record = side.manifest.tensors.get(name) if side.manifest is not None else None
            if record is None or record.dtype != side.tensors[name].dtype:
                continue
            num_in_manifests += record.xxh3 == found
            if record.xxh3 != found:
                problems[f"{name} in {letter}"] = "is not what its manifest says was written: the file was changed or is damaged"
    for side, letter in ((a, "A"), (b, "B")):
        bad, good = _check_marker(side)
        num_in_manifests += good
        problems |= {f"{file} in {letter}": sentence for file, sentence in bad.items()}
    num_bytes = sum(task.num_bytes for task in tasks)
    num_equal = sum(name not in problems for name in comparisons)
    return Verdict(num_equal, num_bytes, problems, not_compared, num_in_manifests, comparisons)


def run(options: Options) -> bool:
    """The command; whether the two are equal. Prints a report, or one JSON object."""
    a, b = open_sides(options.a, options.b, options.hf_config, options.max_memory, options.num_workers)
    if options.logits:
        check_size(max(_num_elements(side) for side in (a, b)))
    num_bytes = sum(CompareTask(name, rows, rows).num_bytes // 2 for side in (a, b) for name, rows in side.tensors.items())
    verdict = compare(a, b, Pool.choose(options.num_workers, options.max_memory, num_bytes))
    logits = _compare_logits(a, b, options.hf_config) if options.logits else None
    equal = not verdict.problems and (logits is None or logits.is_equal)
    if options.as_json:
        value = {"equal": equal, **asdict(verdict), "logits": None if logits is None else asdict(logits)}
        typer.echo(json.dumps(value, indent=1))
    else:
        _print(Console(highlight=False, soft_wrap=True), a, b, verdict)
        if logits is not None:
            typer.echo(
                f"logits {'agree' if logits.is_equal else 'differ'}: {logits.num_positions} positions in fp32, largest difference "
                f"{logits.max_difference:.2g} of {logits.largest_logit:.3g}, same choice at {logits.num_same_choice}"
            )
    return equal


def _compare_logits(a: Side, b: Side, hf_config: Path | None) -> LogitsComparison:
    hf_dir = next(folder for folder in (hf_config, a.place.hf_dir, b.place.hf_dir) if folder is not None)
    sequences = sample_sequences(read_hf_config(hf_dir)["vocab_size"])
    return compare_logits(logits_of(a.place, hf_dir, sequences), logits_of(b.place, hf_dir, sequences))


def _num_elements(side: Side) -> int:
    return sum(math.prod(rows.shape) for rows in side.tensors.values())


def _open_megatron_side(place: Place, hf_dir: Path | None, max_memory: int, num_workers: int | None) -> Side:
    hf_config = place.hf_config(hf_dir)
    assert hf_dir is not None  # or hf_config would have raised
    with open_reader(place, max_memory, num_workers) as reader:
        check_model(place, reader, hf_config, hf_dir)
        source = open_megatron(reader, compile_mapping(hf_config))
    manifest = place.manifest()
    tensors: dict[str, Rows] = {}
    for name, tensor in source.tensors.items():
        before = None if manifest is None or name not in manifest.tensors else manifest.tensors[name].dtype
        tensors[name] = SpanRows(tensor, narrow=(tensor.dtype, before) == ("F32", "BF16"))
    return Side(place, tensors, {}, source.left_out, manifest)


def _open_hf(place: Place, raw: bool) -> Side:
    """`raw`: FP8 weights and their scales as they are; otherwise dequantised, as Megatron has them."""
    files = HfFiles(place.weights)
    scales = {scale_name(name) for name, tensor in files.tensors.items() if tensor.dtype == FP8 and not raw}
    tensors: dict[str, Rows] = {}
    for name, tensor in files.tensors.items():
        if tensor.dtype == FP8 and not raw:
            tensors[name] = HfRows(place.weights, name, tensor.shape, "BF16")
        elif name not in scales:
            span = whole_span(place.weights / tensor.file, tensor.offset, tensor.shape, tensor.dtype)
            tensors[name] = SpanRows(SpanTensor(name, tensor.shape, tensor.dtype, (span,)))
    return Side(place, tensors, _dispensable(files, _mapping_of(place)), {}, place.manifest())


def _dispensable(files: HfFiles, mapping: ModelMapping | None) -> dict[str, str]:
    reasons: dict[str, str] = {}
    if mapping is not None:
        for name in files.tensors.keys() - mapping.hf_tensors.keys():
            with suppress(MappingError):
                reasons[name] = files.why_ignorable(name, mapping)
    return reasons


def _mapping_of(place: Place) -> ModelMapping | None:
    """None for a model of no known family: two HF directories can be compared all the same."""
    try:
        return compile_mapping(place.hf_config())
    except (MappingError, CheckpointError):
        return None


def _check_marker(side: Side) -> tuple[dict[str, str], int]:
    """Files of a run's checkpoint that are not those its marker lists, and how many are."""
    if not side.place.sealed:
        return {}, 0
    listed = actor_digests(side.place.root, weights_only=True)
    actor = side.place.weights.parent
    bad = {
        name: "is not what its marker says was written: the file was changed or is damaged"
        for name, digest in listed.items()
        if digest_file(actor / name) != digest
    }
    return bad, len(listed) - len(bad)


def _sentence(comparison: Comparison, dtype_a: str, dtype_b: str) -> str | None:
    """What is wrong; None when both are equal bit by bit."""
    if comparison.num_differing:
        count = "1 element differs" if comparison.num_differing == 1 else f"{comparison.num_differing:,} elements differ"
        first = f"first at {list(comparison.first_index or ())}: {comparison.first_a:.9g} in A, {comparison.first_b:.9g} in B"
        text = f"{count}, {first}, largest difference {comparison.max_difference:.3g}"
    else:
        text = "all values are equal"
    if dtype_a == dtype_b:
        return text if comparison.num_differing else None
    explained = (
        "; the wider rounded to the narrower is equal" if comparison.num_differing and comparison.equal_when_rounded else ""
    )
    return f"is {dtype_a} in A, {dtype_b} in B: {text}{explained}"


def _print(console: Console, a: Side, b: Side, verdict: Verdict) -> None:
    for letter, side in (("A", a), ("B", b)):
        step = "" if side.place.step is None else f", step {side.place.step}"
        console.print(f"{letter}: {side.place.root} ({side.place.kind}{step}), {len(side.tensors)} tensors")
        for what, count in side.left_out.items():
            console.print(f"  not compared: {what} ({count} tensors)")
    for name, reason in verdict.not_compared.items():
        console.print(f"  not compared: {name}: {reason}")
    for name, sentence in sorted(verdict.problems.items())[:_MAX_LINES]:
        console.print(f"  [red]{name}[/red] {sentence}", markup=True)
    if len(verdict.problems) > _MAX_LINES:
        console.print(f"  and {len(verdict.problems) - _MAX_LINES} more; --json has all")
    if verdict.num_in_manifests:
        console.print(f"{verdict.num_in_manifests} hashes agree with what was recorded when it was written")
    total = len(a.tensors.keys() | b.tensors.keys())
    if verdict.problems:
        console.print(f"[red]different[/red]: {verdict.num_equal} of {total} tensors are bit-exact")
    else:
        console.print(
            f"[green]bit-exact[/green]: {verdict.num_equal} of {total} tensors, {format_bytes(verdict.num_bytes // 2)} each"
        )
