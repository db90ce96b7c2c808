"""A plan on the terminal: the best layouts, what bounds them, the settings of the best one, and why the others are not there."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text

from dapo_megatron.layout.in_flight import passes_in_flight
from dapo_megatron.layout.layout import Layout
from dapo_megatron.layout.memory_records import MemoryItem, PhaseMemory, StageMemory
from dapo_megatron.layout.plan import Candidate, Plan, PlanRequest, Rejection, RejectionKind
from dapo_megatron.layout.report_yaml import yaml_of
from dapo_megatron.layout.search import cut_sizes
from dapo_megatron.layout.space import release_problem
from dapo_megatron.layout.step_time import PHASES

PHASE_WORDS = {"rollout": "rollout", "log_probs": "log-probs", "train": "training", "sync": "weight sync"}
KIND_WORDS: dict[RejectionKind, str] = {
    "memory": "GPU memory is too small",
    "host_memory": "host memory is too small",
    "rule": "a rule of megatron-core or of the configuration",
    "release": "this version cannot run it",
    "slower": "slower than another of the same cut, or than those shown",
}
UNRUNNABLE = "*"
"""Marks a layout that --all lets in."""
NARROWEST = 116
"""Characters that the whole table of layouts needs: a narrower terminal gets fewer columns, a pipe all of them."""
NUM_REASONS = 2
"""Examples per kind of rejection."""


def print_plan(plan: Plan, top: int, console: Console) -> None:
    """Everything a person needs to choose."""
    say(console, heading(plan.request), style="bold")
    for note in plan.notes:
        say(console, f"note: {note}", style="dim")
    if plan.candidates:
        best = best_of_cuts(plan.candidates)[:top]
        is_wide = console.width >= NARROWEST
        console.print(_table(plan, best, is_wide))
        if not is_wide:
            say(console, f"a terminal of {NARROWEST} characters shows engines, phases, rate and MFU too", style="dim")
        if any(release_problem(candidate.layout) for candidate in best):
            say(console, f"{UNRUNNABLE} this version cannot run it", style="yellow")
        say(console, "limited by", style="dim")
        for place, candidate in enumerate(best, 1):
            say(console, f"{place}: {candidate.limit}", style="dim", indent=1)
        _print_gains(plan.candidates[0], console)
    else:
        say(console, "No layout fits.", style="bold red")
    _print_rejections(plan, console)


def print_settings(candidate: Candidate, request: PlanRequest, submit: str, console: Console) -> None:
    """The YAML of a layout, ready to paste, and the command that starts it."""
    console.print()
    say(console, f"Settings of {candidate.layout}:", style="bold")
    console.print(Padding(Text(yaml_of(candidate.layout, request).rstrip(), style="cyan"), (0, 0, 0, 2), expand=False))
    console.print()
    console.print(submit, style="green", highlight=False, markup=False, soft_wrap=True)


def print_candidate(plan: Plan, candidate: Candidate, console: Console) -> None:
    """One layout, itemised: memory of every stage in every phase, time of every part."""
    say(console, heading(plan.request), style="bold")
    others = f", the fastest of {len(plan.candidates)} that fit" if len(plan.candidates) > 1 else ", the only one that fits"
    say(console, f"{describe(candidate.layout)}{others}; limited by {candidate.limit}")
    stages = _distinct_stages(candidate.memory.stages)
    for phase in candidate.memory.stages[0].phases:
        table = _memory_table(phase.phase, stages, plan.request.gpu.memory_bytes)
        if phase.phase == "train":
            of_chunks = " (of a chunk)" if candidate.layout.virtual_pipeline_size else ""
            table.add_row(
                f"forward passes in flight{of_chunks}", *(_passes(candidate.layout, stage.stage) for _, stage in stages)
            )
        console.print(table)
    console.print(_time_table(candidate))
    memory = candidate.memory
    say(console, f"host memory of a node: {gb(memory.host_bytes)} GB" + _listed(memory.host_items))
    say(
        console,
        f"checkpoint: {gb(memory.checkpoint.total_bytes)} GB, of it {gb(memory.checkpoint.weight_bytes)} GB weights; "
        f"{memory.checkpoint.save_seconds:.0f} s to write at {plan.request.disk_gb_per_second:g} GB/s a node",
    )
    if memory.engine is not None:
        say(console, f"GPU of an engine: {gb(memory.engine.total_bytes)} GB" + _listed(memory.engine.items))
    if memory.kv_cache_tokens is not None:
        say(console, f"KV cache of an engine: {memory.kv_cache_tokens:,} tokens")
    _print_gains(candidate, console)


def print_rejections(rejections: Sequence[Rejection], console: Console) -> None:
    """Why layouts were left out, one line each."""
    for rejection in rejections:
        say(console, f"{describe(rejection.layout)}: {rejection.reason}", style="yellow")


def plan_console() -> Console:
    """Standard output for `print_plan`, which fits itself to a terminal; anything else gets the whole table."""
    console = Console()
    return console if console.is_terminal else wide_console()


def wide_console() -> Console:
    """Standard output with room for a table, which a narrower terminal breaks."""
    console = Console()
    return console if console.width >= NARROWEST else Console(width=NARROWEST)


def say(console: Console, text: str, style: str | None = None, *, indent: int = 0) -> None:
    """A paragraph as it is, wrapped at the console's width."""
    console.print(Padding(Text(text), (0, 0, 0, indent), expand=False), style=style, highlight=False, markup=False)


def heading(request: PlanRequest) -> str:
    """What was planned, in one line."""
    workload, per_node = request.workload, request.gpus_per_node
    nodes = f", {request.num_gpus // per_node} nodes of {per_node}" if request.num_gpus > per_node else ""
    place = "" if request.num_rollout_gpus is None else f" ({request.num_rollout_gpus} of them for engines)"
    return (
        f"{request.model_name} on {request.num_gpus} x {request.gpu.name}{nodes}{place}: {workload.num_prompts_per_step} prompts x "
        f"{workload.num_samples_per_prompt} samples, up to {workload.max_prompt_tokens} + {workload.max_response_tokens} tokens, "
        f"on average {workload.prompt_tokens:.0f} + {workload.response_tokens:.0f}"
    )


def describe(layout: Layout) -> str:
    """A layout with what is not in its sizes."""
    return f"{layout}, {layout.max_tokens_per_micro_batch} tokens a micro-batch, recompute {saved(layout)}"


def saved(layout: Layout) -> str:
    """What a layout does to need less memory."""
    offload = {(True, True): ", offload", (True, False): ", optimizer offload", (False, True): ", parameter offload"}
    cpu_adam = f", {layout.optimizer_offload_fraction:.0%} CPU Adam" if layout.optimizer_offload_fraction else ""
    return f"{layout.recompute}{offload.get((layout.swap_optimizer, layout.swap_parameters), '')}{cpu_adam}"


def best_of_cuts(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The fastest candidate of each way to cut the model, fastest first."""
    found: dict[tuple[int, ...], Candidate] = {}
    for candidate in candidates:
        found.setdefault(cut_sizes(candidate.layout), candidate)
    return list(found.values())


def nearest_first(rejections: Sequence[Rejection]) -> list[Rejection]:
    """Those that nearly fit, or are nearly as fast, first; then those that stand for most."""

    def key(rejection: Rejection) -> tuple[float, float, int]:
        peak, seconds = rejection.peak_bytes, rejection.step_seconds
        return math.inf if peak is None else peak, math.inf if seconds is None else seconds, -rejection.num_layouts

    return sorted(rejections, key=key)


def train_peak_bytes(candidate: Candidate) -> int:
    """Of the fullest GPU while it trains: in the rollout the KV cache fills whatever there is."""
    return max(phase.total_bytes for stage in candidate.memory.stages for phase in stage.phases if phase.phase == "train")


def gb(num_bytes: float) -> str:
    """Decimal gigabytes, as cards are sold."""
    return f"{num_bytes / 1e9:.1f}"


def kinds(plan: Plan) -> dict[RejectionKind, int]:
    """Layouts rejected, by kind, most first."""
    counts: Counter[RejectionKind] = Counter()
    for rejection in plan.rejections:
        counts[rejection.kind] += rejection.num_layouts
    return dict(counts.most_common())


def _table(plan: Plan, best: Sequence[Candidate], is_wide: bool) -> Table:
    numbers = ("train GB", "step s", "rollout", "train", "tok/s", "MFU") if is_wide else ("train GB", "step s")
    table = Table(
        "",
        Column("layout", min_width=18),
        Column("tokens", justify="right", no_wrap=True),
        Column("recompute", overflow="fold", min_width=16),
        *([Column("engines", no_wrap=True)] if is_wide else []),
        *(Column(name, justify="right", no_wrap=True, min_width=len(name)) for name in numbers),
        title=f"{len(plan.candidates):,} of {plan.num_enumerated:,} layouts fit and are in the running; the best of each cut of the model",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for place, candidate in enumerate(best, 1):
        layout, time = candidate.layout, candidate.time
        train = time.phase_seconds("train") + time.phase_seconds("log_probs")
        engines = "" if layout.engine is None else f"{layout.engine.num_engines} x TP{layout.engine.tensor_parallel_size}"
        rates = f"{time.phase_seconds('rollout'):.0f}", f"{train:.0f}", f"{time.tokens_per_gpu_second:.0f}", f"{time.mfu:.0%}"
        table.add_row(
            str(place),
            str(layout) + (f" {UNRUNNABLE}" if release_problem(layout) else ""),
            str(layout.max_tokens_per_micro_batch),
            saved(layout),
            *([engines] if is_wide else []),
            gb(train_peak_bytes(candidate)),
            f"{time.step_seconds:.0f}",
            *(rates if is_wide else ()),
            style="bold" if place == 1 else None,
        )
    return table


def _print_gains(candidate: Candidate, console: Console) -> None:
    if candidate.gains:
        say(console, f"to gain: {'; '.join(candidate.gains)}", style="green")


def _print_rejections(plan: Plan, console: Console) -> None:
    counts = kinds(plan)
    if not counts:
        return
    console.print()
    say(console, f"{sum(counts.values()):,} layouts rejected:", style="bold")
    reasons: dict[RejectionKind, list[Rejection]] = defaultdict(list)
    for rejection in plan.rejections:
        reasons[rejection.kind].append(rejection)
    for kind, count in counts.items():
        say(console, f"{count:8,}  {KIND_WORDS[kind]}")
        distinct = {rejection.reason: rejection for rejection in reversed(nearest_first(reasons[kind]))}
        for reason, rejection in list(reversed(distinct.items()))[:NUM_REASONS]:
            say(console, f"{describe(rejection.layout)}: {reason}", style="dim", indent=10)


def _distinct_stages(stages: Sequence[StageMemory]) -> list[tuple[str, StageMemory]]:
    """Neighbouring stages with the same account are one column."""
    groups: list[list[StageMemory]] = []
    for stage in stages:
        if groups and groups[-1][0].phases == stage.phases:
            groups[-1].append(stage)
        else:
            groups.append([stage])
    return [(f"stage {group[0].stage}" + (f"-{group[-1].stage}" if len(group) > 1 else ""), group[0]) for group in groups]


def _memory_table(phase: str, stages: Sequence[tuple[str, StageMemory]], capacity: int) -> Table:
    accounts = [next(account for account in stage.phases if account.phase == phase) for _, stage in stages]
    table = Table(
        "GB",
        *(Column(name, justify="right") for name, _ in stages),
        title=f"GPU memory, {PHASE_WORDS[phase]}",
        box=SIMPLE_HEAD,
    )
    for name in _item_names(accounts):
        table.add_row(name, *(_or_nothing(account.bytes_of(name)) for account in accounts))
    table.add_section()
    table.add_row(f"sum, of {gb(capacity)}", *(gb(account.total_bytes) for account in accounts), style="bold")
    return table


def _passes(layout: Layout, stage: int) -> str:
    """How often the activations of a stage are there at the fullest moment."""
    return str(sum(passes_in_flight(stage, layout.pipeline_parallel_size, layout.num_chunks, layout.num_micro_batches)))


def _item_names(accounts: Sequence[PhaseMemory]) -> list[str]:
    """In the order of the accounts, whatever stage has them."""
    return list(dict.fromkeys(item.name for account in accounts for item in account.items))


def _or_nothing(num_bytes: int) -> str:
    return gb(num_bytes) if num_bytes else ""


def _time_table(candidate: Candidate) -> Table:
    time = candidate.time
    table = Table(
        "", Column("seconds", justify="right"), Column("share", justify="right"), title="One rollout step", box=SIMPLE_HEAD
    )
    for phase in PHASES:
        items = [item for item in time.items if item.phase == phase]
        if not items:
            continue
        total = time.phase_seconds(phase)
        table.add_row(PHASE_WORDS[phase], f"{total:.1f}", f"{total / time.step_seconds:.0%}", style="bold")
        for item in items:
            table.add_row(f"  {item.name}", f"{item.seconds:.1f}", f"{item.seconds / time.step_seconds:.0%}")
    table.add_section()
    table.add_row("step", f"{time.step_seconds:.1f}", "", style="bold")
    return table


def _listed(items: Sequence[MemoryItem]) -> str:
    names = [f"{item.name} {gb(item.num_bytes)}" for item in items]
    return f" ({', '.join(names)})" if names else ""
