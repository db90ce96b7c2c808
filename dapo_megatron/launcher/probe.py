"""`dapo-megatron probe`: a few optimizer steps of each of the best layouts, on real ranks here, ranked by what was measured.

A step's time is a line in its number of micro-batches, so a short step and a longer one of full micro-batches say how long any step takes.
Without a GPU, or with --shrink, a narrow random model stands in (`models/shrink.py`): that compares schedules and communication on
this machine, nothing else.
"""

from __future__ import annotations

import asyncio
import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table

from dapo_megatron.actor.probed import MeasuredLayout, Probed
from dapo_megatron.config.checks import check_layout, read_hf_config
from dapo_megatron.config.load import load_config
from dapo_megatron.config.schema import Config
from dapo_megatron.launcher.probe_batch import ProbeLengths, probe_batch
from dapo_megatron.launcher.recorded_batch import read_recorded
from dapo_megatron.layout.report import say
from dapo_megatron.models.shrink import shrunk_for, write_random_model
from dapo_megatron.types import ConfigError

NUM_MICRO_BATCHES = (4, 4, 8, 4, 8)
"""Of the warm-up step, then of a short and a long one, twice."""
MOST_CPU_RANKS = 16
"""Where there is no GPU: each is a process with torch in it."""
SHRUNK_TOKENS = 512
"""Tokens of the largest micro-batch under a shrunk model; the others keep their proportion to it."""


@dataclass(frozen=True, slots=True)
class PlannedLayout:
    """A layout to try: how it is called, its settings as override tokens, and what was planned for it, where it was."""

    name: str
    overrides: Sequence[str]
    planned_seconds: float | None = None
    """Training of one rollout step."""


@dataclass(frozen=True, slots=True)
class ProbeRequest:
    """What the command was asked: a run, the layouts to try, and how to run them."""

    files: Sequence[Path]
    overrides: Sequence[str]
    layouts: Sequence[PlannedLayout]
    lengths: ProbeLengths
    num_tokens_per_update: float
    """Of a real optimizer step, over all data-parallel ranks."""
    copies: int | None
    """Data-parallel ranks to start per layout. None: as many as the layout has."""
    shrink: bool | None
    """None: where there is no GPU."""
    as_json: bool


@dataclass(frozen=True, slots=True)
class ProbedLayout:
    """A layout with its measurement and what follows for one rollout step of the real size."""

    layout: PlannedLayout
    measured: MeasuredLayout
    num_micro_batches: int
    train_seconds: float
    """Training of one rollout step: every optimizer step and the old log-probs."""


def probe(request: ProbeRequest, console: Console) -> int:
    """Returns the exit code. Raises ConfigError for a layout that cannot run here."""
    shrink = request.shrink if request.shrink is not None else not torch.cuda.is_available()
    asked = [_load(request, layout, []) for layout in request.layouts]
    original = read_hf_config(asked[0].model.path)
    _require_possible(request, asked, original)
    with tempfile.TemporaryDirectory() as folder:
        overrides: list[str] = []
        if shrink:
            original = shrunk_for(original, [config.actor for config in asked])
            write_random_model(original, Path(folder) / "model", asked[0].run.seed)
            overrides = [f"--model.path={Path(folder) / 'model'}", "--model.dtype=fp32"]
        scale = min(1.0, SHRUNK_TOKENS / max(config.actor.max_tokens_per_micro_batch for config in asked)) if shrink else 1.0
        configs = [_to_start(request, layout, overrides, scale) for layout in request.layouts]
        lengths = _scaled(request.lengths, scale)
        measured = _measure(configs, lengths, original["vocab_size"], console)
    found = sorted(
        (_whole_step(*each, request.num_tokens_per_update) for each in zip(request.layouts, asked, measured, strict=True)),
        key=lambda probed: probed.train_seconds,
    )
    if request.as_json:
        console.print_json(json.dumps({"shrunk": shrink, "layouts": [asdict(probed) for probed in found]}))
    else:
        _print(found, original, shrink, console)
    return 0


def recorded_lengths(batch: Path) -> ProbeLengths:
    """Those of a recorded batch: RUN or a file of RUN/batches."""
    samples = [sample for step in read_recorded(batch).optimizer_steps for sample in step]
    prompts = {sample.token_ids[: sample.num_prompt_tokens].tobytes() for sample in samples}
    return ProbeLengths(
        [sample.num_prompt_tokens for sample in samples],
        [sample.num_loss_tokens for sample in samples],
        max(1, len(samples) // len(prompts)),
    )


def _load(request: ProbeRequest, layout: PlannedLayout, more: Sequence[str]) -> Config:
    nothing_saved = ["--checkpoint.every=0", "--checkpoint.load=null", "--run.max_restarts=0", "--cluster.backend=ray"]
    return load_config(request.files, [*request.overrides, *nothing_saved, *layout.overrides, *more])


def _to_start(request: ProbeRequest, layout: PlannedLayout, overrides: Sequence[str], scale: float) -> Config:
    """The layout with fewer copies and, of a shrunk model, shorter micro-batches."""
    actor = _load(request, layout, []).actor
    copies = request.copies or actor.data_parallel_size
    tokens = max(2, round(actor.max_tokens_per_micro_batch * scale))
    sizes = [f"--actor.num_ranks={actor.model_parallel_size * copies}", f"--actor.max_tokens_per_micro_batch={tokens}"]
    return _load(request, layout, [*overrides, *sizes])


def _require_possible(request: ProbeRequest, configs: Sequence[Config], hf_config: dict) -> None:
    problems = []
    num_gpus = torch.cuda.device_count()
    for layout, config in zip(request.layouts, configs, strict=True):
        problems += [f"{layout.name}: {problem}" for problem in check_layout(config, hf_config)]
        actor = config.actor
        copies = request.copies or actor.data_parallel_size
        wanted, available = actor.model_parallel_size * copies, num_gpus or MOST_CPU_RANKS
        if config.cluster.ray_address is None and wanted > available:
            what = "GPUs" if num_gpus else "processes at most without a GPU"
            one_copy = "" if copies == 1 or actor.model_parallel_size > available else "; --copies 1 starts one copy of the model"
            problems.append(
                f"{layout.name}: {wanted} ranks are more than this machine's {available} {what}{one_copy or '; give cluster.ray_address'}."
            )
        if request.copies and request.copies > actor.data_parallel_size:
            problems.append(
                f"{layout.name}: --copies ({request.copies}) must not exceed its data-parallel size ({actor.data_parallel_size})."
            )
    if problems:
        raise ConfigError(problems)


def _scaled(lengths: ProbeLengths, scale: float) -> ProbeLengths:
    def shorter(values: Sequence[int]) -> list[int]:
        return [max(1, round(value * scale)) for value in values]

    return ProbeLengths(shorter(lengths.prompts), shorter(lengths.responses), lengths.num_samples_per_prompt)


def _measure(configs: Sequence[Config], lengths: ProbeLengths, vocab_size: int, console: Console) -> list[MeasuredLayout]:
    """One layout after the other, each with ranks of its own. Their logs: RUN/logs/probe_N."""
    from dapo_megatron.launcher.ray.backend import ray_backend
    from dapo_megatron.launcher.ray.session import ray_session

    measured = []
    with ray_session(max(configs, key=lambda config: config.actor.world_size)):
        for index, config in enumerate(configs):
            actor = config.actor
            multiple = actor.pipeline_parallel_size if actor.virtual_pipeline_size else 1
            batch = probe_batch(
                lengths,
                [-(-number // multiple) * multiple for number in NUM_MICRO_BATCHES],
                num_copies=actor.data_parallel_size,
                max_tokens=actor.max_tokens_per_micro_batch,
                vocab_size=vocab_size,
                seed=config.run.seed,
            )
            with (
                console.status(f"layout {index + 1} of {len(configs)}: {actor.world_size} ranks"),
                ray_backend(config, config.run.dir / "logs" / f"probe_{index + 1}", num_engines=0) as processes,
            ):
                ranks = asyncio.run(processes.actor.probe(batch, config.actor.optimizer.num_warmup_rollout_steps))
            measured.append(MeasuredLayout.of(_slowest(ranks)))
    return measured


def _slowest(ranks: Sequence[Probed]) -> Probed:
    """Barriers make times alike; memory is that of the fullest rank."""
    peaks = [probed.peak_device_bytes for probed in ranks if probed.peak_device_bytes is not None]
    slowest = max(ranks, key=lambda probed: sum(step.update_seconds for step in probed.steps))
    return Probed(slowest.steps, max(peaks) if peaks else None)


def _whole_step(layout: PlannedLayout, config: Config, measured: MeasuredLayout, num_tokens_per_update: float) -> ProbedLayout:
    """The configuration is the layout's own, with all its copies and whole micro-batches."""
    actor = config.actor
    multiple = actor.pipeline_parallel_size if actor.virtual_pipeline_size else 1
    number = math.ceil(num_tokens_per_update / (actor.data_parallel_size * actor.max_tokens_per_micro_batch))
    number = -(-number // multiple) * multiple
    seconds = measured.rollout_step_seconds(
        num_updates=config.train.num_updates_per_rollout,
        num_micro_batches=number,
        log_probs=config.algo.old_log_probs == "actor",
    )
    return ProbedLayout(layout, measured, number, seconds)


def _print(found: Sequence[ProbedLayout], hf_config: dict, shrunk: bool, console: Console) -> None:
    if shrunk:
        say(
            console,
            f"model: a random {hf_config['model_type']} of {hf_config['num_hidden_layers']} narrow layers in place of model.path, shorter "
            "micro-batches: the order is that of schedules and communication on this machine (--no-shrink: the model itself)",
        )
    numbers = ("fixed s", "s/micro-batch", "log-probs", "micro-batches", "training s", "planned s", "GB")
    rows = [
        (
            f"{probed.measured.fixed_seconds:.3f}",
            f"{probed.measured.seconds_per_micro_batch:.3f}",
            f"{probed.measured.log_prob_seconds_per_micro_batch:.3f}",
            str(probed.num_micro_batches),
            f"{probed.train_seconds:.3g}",
            "" if shrunk or probed.layout.planned_seconds is None else f"{probed.layout.planned_seconds:.3g}",
            "" if probed.measured.peak_device_bytes is None else f"{probed.measured.peak_device_bytes / 1e9:.1f}",
        )
        for probed in found
    ]
    shown = [index for index in range(len(numbers)) if any(row[index] for row in rows)]
    columns = [Column(numbers[index], justify="right", no_wrap=True, min_width=len(numbers[index])) for index in shown]
    table = Table("", Column("layout", min_width=30), *columns, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for place, (probed, row) in enumerate(zip(found, rows, strict=True), 1):
        name = probed.layout.name + (" (noisy)" if probed.measured.noisy else "")
        table.add_row(str(place), name, *(row[index] for index in shown))
    console.print(table)
    of_memory = "; GB: allocated by torch at the peak" if any(row[-1] for row in rows) else ""
    say(
        console,
        "training s: of one rollout step, from the fixed part of an optimizer step, its micro-batches and their old log-probs"
        + of_memory,
        style="dim",
    )
    if any(probed.measured.noisy for probed in found):
        say(console, "noisy: a longer step did not take longer; probe again while the machine is idle", style="yellow")
