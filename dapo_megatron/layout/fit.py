"""Whether a layout fits a device, and the one sentence that says why not."""

from __future__ import annotations

from dapo_megatron.layout.layout import Layout
from dapo_megatron.layout.memory_records import MemoryPlan, PhaseMemory

GB = 1e9
_PHASES = {"train": "training", "log_probs": "the log-prob pass", "rollout": "rollout", "sync": "the weight sync"}
_NUM_NAMED_ITEMS = 3


def reason_not_fitting(plan: MemoryPlan, layout: Layout, gpu_bytes: float) -> str | None:
    """Of the fullest stage and phase: what is needed, the largest items, what helps. None when everything fits."""
    peak, where = plan.fullest.peak, f"stage {plan.fullest.stage}" if layout.pipeline_parallel_size > 1 else "a GPU"
    if plan.engine is not None and plan.engine.total_bytes > peak.total_bytes:
        peak, where = plan.engine, "an engine's GPU"
    if peak.total_bytes <= gpu_bytes:
        return None
    items = sorted(peak.items, key=lambda item: -item.num_bytes)[:_NUM_NAMED_ITEMS]
    named = ", ".join(f"{item.name} {item.num_bytes / GB:.1f}" for item in items)
    return (
        f"{where} needs {peak.total_bytes / GB:.1f} of {gpu_bytes / GB:.1f} GB in {_PHASES[peak.phase]} ({named}); "
        f"{_remedy(peak, layout, gpu_bytes)}"
    )


def _remedy(peak: PhaseMemory, layout: Layout, gpu_bytes: float) -> str:
    """For the states where they alone are too much, else for the largest thing that a layout can make smaller."""
    tensor = layout.tensor_parallel_size
    activations = sum(item.num_bytes for item in peak.items if item.name.startswith("activations"))
    states = {name: peak.bytes_of(name) for name in ("weights", "gradients", "optimizer state")}
    head = peak.bytes_of("LM head and loss")
    workspace = peak.bytes_of("backward workspace") + peak.bytes_of("forward workspace")
    engine = peak.bytes_of("engine weights") + peak.bytes_of("KV cache")
    all_states = sum(states.values())
    largest = all_states if all_states > gpu_bytes else max(activations, all_states, head, workspace, engine)
    if largest == engine and layout.embedded is not None:
        less = "a smaller rollout.engine.max_batch_size" + (", or dtype bf16" if layout.embedded.element_bytes > 2 else "")
        elsewhere = ", cluster.placement split" if layout.embedded.colocated else ""
        return f"use {less}{elsewhere}, or rollout.engine.type sglang, whose engines share a model out and sleep."
    if largest == engine:
        if all_states and peak.phase == "rollout":
            return "swap weights and optimizer state out, or lower rollout.engine.mem_fraction_static."
        return "lower rollout.engine.mem_fraction_static, or use more GPUs for an engine."
    if largest == head:
        return f"use tensor parallelism above {tensor}, or smaller actor.log_prob_chunk_tokens."
    if largest in (activations, workspace):
        more = "recompute more" if layout.recompute.granularity != "full" else f"use tensor parallelism above {tensor}"
        return f"{more}, or use fewer than {layout.max_tokens_per_micro_batch} tokens per micro-batch."
    if states["optimizer state"] == max(states.values()):
        return "use more data-parallel ranks, which share out the optimizer state, or compute part of it on the host."
    return f"cut the model over more ranks than TP{tensor} x PP{layout.pipeline_parallel_size}."
