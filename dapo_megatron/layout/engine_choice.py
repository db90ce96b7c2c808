"""Which SGLang engines go with a cut of the actor: tensor-parallel size and share of the device that generate fastest."""

from __future__ import annotations

from dataclasses import replace

from dapo_megatron.config.layout_rules import divisors
from dapo_megatron.layout.engine_memory import engine_memory
from dapo_megatron.layout.layer_time import Machine
from dapo_megatron.layout.layout import EngineLayout, Layout
from dapo_megatron.layout.memory import engine_room_bytes, resident_bytes
from dapo_megatron.layout.memory_records import MemoryOptions
from dapo_megatron.layout.plan import PlanRequest, Rejection
from dapo_megatron.layout.rollout_time import rollout_seconds

MAX_SHARE = 0.90
"""Of a device's memory that SGLang may take for weights and KV cache."""
STEPS_OF_SHARE = 100
"""Shares are whole per cents."""


def fastest_rollout_seconds(request: PlanRequest, machine: Machine, options: MemoryOptions) -> float:
    """Generation on devices that hold nothing else: no layout of the actor makes it faster."""
    num_gpus, gpu_bytes = request.num_rollout_gpus or request.num_gpus, request.gpu.memory_bytes
    seconds = []
    for tensor in _sizes(request, num_gpus):
        engine = EngineLayout(tensor, num_gpus // tensor, MAX_SHARE, request.colocated)
        memory = engine_memory(request.model, engine, options)
        tokens = int(memory.kv_pool_bytes(MAX_SHARE, gpu_bytes) / memory.kv_bytes_per_token)
        if tokens >= request.workload.max_sequence_tokens:
            seconds.append(rollout_seconds(machine, request.model, engine, request.workload, tokens).total)
    return min(seconds, default=0.0)


def _sizes(request: PlanRequest, num_gpus: int) -> list[int]:
    """GPUs of an engine: what divides a node, then several nodes."""
    sizes = [*divisors(request.gpus_per_node), *(request.gpus_per_node * nodes for nodes in (2, 4, 8))]
    return [size for size in sizes if num_gpus % size == 0 and request.model.attention.num_heads % size == 0]


def with_engines(request: PlanRequest, machine: Machine, options: MemoryOptions, layout: Layout) -> Layout | Rejection:
    """The layout with its best engines, or why there is no room for any. Micro-batches and recompute do not matter here."""
    num_gpus = request.num_rollout_gpus or request.num_gpus
    gpu_bytes, longest = request.gpu.memory_bytes, request.workload.max_sequence_tokens
    best: tuple[float, EngineLayout] | None = None
    room = 0.0
    resident = resident_bytes(request.model, layout, options) if request.colocated else None
    for tensor in _sizes(request, num_gpus):
        if best is not None and tensor > request.gpus_per_node:
            break  # over nodes only where one node cannot hold the model
        engine = EngineLayout(tensor, num_gpus // tensor, 0.0, request.colocated)
        memory = engine_memory(request.model, engine, options)
        room = max(room, free := engine_room_bytes(memory, layout, resident, gpu_bytes))
        share = min(MAX_SHARE, int(STEPS_OF_SHARE * free / gpu_bytes) / STEPS_OF_SHARE)
        tokens = int(memory.kv_pool_bytes(share, gpu_bytes) / memory.kv_bytes_per_token)
        if share <= 0 or tokens < longest:
            continue
        seconds = rollout_seconds(machine, request.model, engine, request.workload, tokens).total
        if best is None or seconds < best[0]:
            best = seconds, replace(engine, mem_fraction_static=share)
    if best is not None:
        return replace(layout, engine=best[1])
    remedy = "cut the actor over more ranks" + ("" if layout.swap_parameters else ", or use actor.offload")
    return Rejection(
        layout,
        "memory",
        f"beside the actor's states engines find {room / 1e9:.1f} of {gpu_bytes / 1e9:.1f} GB, too little for weights and the KV cache of "
        f"one sequence of {longest} tokens; {remedy if request.colocated else 'use a GPU with more memory'}",
    )
