"""What bounds a layout, and what to change to be faster."""

from __future__ import annotations

import math
from dataclasses import replace

from dapo_megatron.layout.fit import reason_not_fitting
from dapo_megatron.layout.hardware import Gpu
from dapo_megatron.layout.layer_time import Machine, TimeOptions
from dapo_megatron.layout.layout import NO_RECOMPUTE, Layout
from dapo_megatron.layout.memory import plan_memory
from dapo_megatron.layout.memory_records import MemoryOptions, MemoryPlan
from dapo_megatron.layout.plan import Candidate, PlanRequest
from dapo_megatron.layout.space import recompute_choices
from dapo_megatron.layout.step_time import PHASES, Phase, StepTime, step_time
from dapo_megatron.layout.train_time import micro_batches
from dapo_megatron.layout.workload import Workload

WORTH_NAMING = 0.01
"""Share of a step below which a gain is not named."""
NEAR = 0.3
"""Share of a GPU's memory up to which missing memory is worth naming."""
_PHASE_WORDS: dict[Phase, str] = {
    "rollout": "generation",
    "log_probs": "old log-probs",
    "train": "training",
    "sync": "weight sync",
}


def limit_of(memory: MemoryPlan, time: StepTime, gpu: Gpu) -> str:
    """The longest phase, what it waits for most, and how full the fullest GPU is outside generation, whose KV cache fills it anyway."""
    phase = max(PHASES, key=time.phase_seconds)
    if phase == "rollout" and time.decode_bound is not None:
        reason = time.decode_bound
    else:
        reason = max((item for item in time.items if item.phase == phase), key=lambda item: item.seconds).name
    share = time.phase_seconds(phase) / time.step_seconds
    peak, stage, busy = max(
        (account.total_bytes, -stage.stage, account.phase)
        for stage in memory.stages
        for account in stage.phases
        if account.phase != "rollout"
    )
    return (
        f"{_PHASE_WORDS[phase]} {share:.0%} of the step ({reason}); "
        f"{_PHASE_WORDS[busy]} {peak / 1e9:.1f} of {gpu.memory_bytes / 1e9:.1f} GB on stage {-stage}"
    )


def gains_of(request: PlanRequest, candidate: Candidate, options: MemoryOptions) -> tuple[str, ...]:
    """Changes outside the layout, each with what it would save of a step; the largest first."""
    layout, workload = candidate.layout, request.workload
    changes: list[tuple[str, Layout, Workload]] = []
    if workload.sampler == "waves" and workload.over_sampling > 1 and layout.engine is not None:
        changes.append(("rollout.sampler streaming", layout, replace(workload, sampler="streaming")))
    if workload.has_old_log_probs_pass:
        changes.append(("algo.old_log_probs engine", layout, replace(workload, has_old_log_probs_pass=False)))
    if layout.recompute != NO_RECOMPUTE:
        without = replace(layout, recompute=NO_RECOMPUTE)
        peak = plan_memory(request.model, without, request.gpu.memory_bytes, options).peak_bytes
        missing = peak - request.gpu.memory_bytes
        if missing < NEAR * request.gpu.memory_bytes:
            changes.append(
                (f"{missing / 1e9:.1f} GB more a GPU, for no recompute instead of {layout.recompute}", without, workload)
            )
    if grown := _on_more_nodes(request, layout, options):
        changes.append((*grown, workload))
    machine = Machine(request.gpu, TimeOptions(gpus_per_node=request.gpus_per_node))
    found = []
    for words, changed, asked in changes:
        time = step_time(machine, request.model, changed, asked, candidate.memory.kv_cache_tokens, request.calibration)
        saved = 1 - time.step_seconds / candidate.time.step_seconds
        if saved >= WORTH_NAMING:
            found.append((saved, f"{words}: -{saved:.0%}"))
    return tuple(words for _, words in sorted(found, reverse=True))


def _on_more_nodes(request: PlanRequest, layout: Layout, options: MemoryOptions) -> tuple[str, Layout] | None:
    """The same cut with the fewest whole nodes that more copies of it fill, with the least recompute that fits there."""
    unit = math.lcm(layout.model_parallel_size, layout.expert_model_parallel_size)
    more = math.lcm(unit, request.gpus_per_node)
    engine = layout.engine
    if engine is not None and engine.colocated:
        engine = replace(engine, num_engines=engine.num_engines + more // engine.tensor_parallel_size)
    ranks = layout.world_size + more
    grown = replace(layout, data_parallel_size=ranks // layout.model_parallel_size, engine=engine)
    if grown.data_parallel_size > request.workload.num_samples_per_update:
        return None
    nodes = more // request.gpus_per_node
    words = f"+{nodes} node" + ("s" if nodes > 1 else "")
    for recompute in recompute_choices(request.model):
        sized = replace(grown, recompute=recompute)
        sized = replace(sized, num_micro_batches=micro_batches(request.workload, sized).num_micro_batches)
        memory = plan_memory(request.model, sized, request.gpu.memory_bytes, options)
        if reason_not_fitting(memory, sized, request.gpu.memory_bytes) is None:
            removed = f" removes recompute {layout.recompute}" if recompute != layout.recompute else ""
            return words + removed, sized
    return None
