"""Memory of a layout, itemised: device memory of every pipeline stage in every phase, host memory, checkpoint.

A phase is what a rollout step does one after the other: `train`, `log_probs` (a forward pass), `rollout` and `sync`. The items of a
phase add up to its peak: what torch's allocator has handed out at the fullest moment, what lies outside it (CUDA context, NCCL), and a
margin for what it holds without having handed out. No coefficient belongs to a model or a row; benchmarks/RESULTS.md says how near this comes to
published peaks.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from functools import lru_cache

from dapo_megatron.layout.activations import LayerActivations, layer_activations
from dapo_megatron.layout.embedded_memory import EmbeddedMemory, embedded_memory
from dapo_megatron.layout.engine_memory import CUDA_CONTEXT_BYTES, GIB, EngineMemory, engine_memory
from dapo_megatron.layout.in_flight import passes_in_flight
from dapo_megatron.layout.layout import EmbeddedEngine, Layout
from dapo_megatron.layout.lm_head import HeadMemory, head_memory, log_prob_workspace
from dapo_megatron.layout.memory_records import (
    DEFAULT_OPTIONS,
    CheckpointMemory,
    MemoryItem,
    MemoryOptions,
    MemoryPlan,
    Phase,
    PhaseMemory,
    StageMemory,
)
from dapo_megatron.layout.model_shape import ModelShape
from dapo_megatron.layout.parameters import num_params
from dapo_megatron.layout.states import StageLayers, StageStates, stage_layers, stage_states

NCCL_BYTES_PER_GROUP = GIB // 4
"""Buffers of one NCCL communicator, outside torch's allocator."""
MARGIN_FRACTION, MARGIN_BYTES = 0.03, 3 * GIB
"""Kept free for what the allocator reserves and has not handed out (fragmentation): a share of what it hands out, and a fixed part."""
FRAGMENTED_SHARE = 0.35
"""Of activations, kept free besides where micro-batches differ in size: what one of them frees is too small for the next one. The least that
refuses the one published layout that is known to have failed so (benchmarks/RESULTS.md); ranks cannot have `expandable_segments`, whose memory
CUDA does not share with an engine."""
PROCESS_HOST_BYTES = 6 * GIB
"""Host memory of one rank's process: libraries, CUDA's host side, data."""

OUTSIDE, MARGIN = "CUDA context and NCCL", "allocator margin"
_NOT_FRAGMENTED = frozenset({"engine asleep", "engine weights", "KV cache", "engine context"})
"""What another process holds, in one piece: no share of the margin is for it."""
_AS_LARGE_AS_A_MICRO_BATCH = frozenset(
    {"activations: attention", "activations: MLP", "activations: experts", "activations: layer inputs", "backward workspace"}
)


def plan_memory(
    shape: ModelShape,
    layout: Layout,
    gpu_bytes: float,
    options: MemoryOptions = DEFAULT_OPTIONS,
    stages_asked: Collection[int] | None = None,
) -> MemoryPlan:
    """Of a layout on GPUs of `gpu_bytes`; a rule of validity that it breaks is not noticed here (`config/checks.py`).

    `stages_asked` limits the account to some stages; None: all.
    """
    states, layers = stage_states(shape, layout, options), stage_layers(shape, layout, options)
    engine = None if layout.engine is None else engine_memory(shape, layout.engine, options)
    colocated = engine if layout.engine is not None and layout.engine.colocated else None
    embedded = None if layout.embedded is None else embedded_memory(shape, layout.embedded)
    stages = tuple(
        StageMemory(stage, _phases(shape, layout, options, gpu_bytes, stage, states[stage], layers[stage], colocated, embedded))
        for stage in (range(layout.pipeline_parallel_size) if stages_asked is None else sorted(stages_asked))
    )
    own = None
    if engine is not None and layout.engine is not None and not colocated:
        own = _engine_phase(engine, engine.kv_pool_bytes(layout.engine.mem_fraction_static, gpu_bytes))
    if embedded is not None and layout.embedded is not None and not layout.embedded.colocated:
        own = _embedded_phase(embedded)
    cache = kv_cache_tokens(shape, layout, gpu_bytes, options)
    return MemoryPlan(stages, _host_items(layout, options, states), _checkpoint(shape, layout, options), own, cache)


def kv_cache_tokens(shape: ModelShape, layout: Layout, gpu_bytes: float, options: MemoryOptions = DEFAULT_OPTIONS) -> int | None:
    """What the KV cache of one server holds; None without servers."""
    if layout.engine is None:
        return None
    engine = engine_memory(shape, layout.engine, options)
    return int(engine.kv_pool_bytes(layout.engine.mem_fraction_static, gpu_bytes) / engine.kv_bytes_per_token)


def train_allocated_bytes(shape: ModelShape, layout: Layout, options: MemoryOptions = DEFAULT_OPTIONS) -> tuple[float, ...]:
    """[stage]: the most that torch's allocator hands out in training (`torch.cuda.max_memory_allocated`). Cheap: for searches."""
    return tuple(sum(num_bytes for _, num_bytes in items) for items in _training(shape, layout, options))


def train_needed_bytes(shape: ModelShape, layout: Layout, options: MemoryOptions = DEFAULT_OPTIONS) -> float:
    """What the device of the fullest stage must have for training, margin included."""
    return max(
        with_margin(sum(num_bytes for _, num_bytes in items), layout) + _fragmented_bytes(items, options)
        for items in _training(shape, layout, options)
    )


def _training(shape: ModelShape, layout: Layout, options: MemoryOptions) -> list[list[tuple[str, float]]]:
    """[stage]: what torch's allocator hands out in training."""
    states, layers = stage_states(shape, layout, options), stage_layers(shape, layout, options)
    return [_train(shape, layout, options, *stage) for stage in zip(range(len(states)), states, layers, strict=True)]


def reserved_bytes(allocated_bytes: float) -> float:
    """What torch's allocator holds of the device when it has handed out so much (`max_memory_reserved`): an estimate."""
    return allocated_bytes * (1 + MARGIN_FRACTION) + MARGIN_BYTES


def with_margin(allocated_bytes: float, layout: Layout) -> float:
    """What a device needs for a phase whose allocations are these: context, NCCL and the allocator's margin come on top."""
    return reserved_bytes(allocated_bytes) + _outside(layout)


def resident_bytes(shape: ModelShape, layout: Layout, options: MemoryOptions = DEFAULT_OPTIONS) -> float:
    """What of the actor's states the fullest GPU holds while engines generate: without what the layout swaps out."""
    return max(
        sum(num_bytes for _, num_bytes in _resident(states, layout.swap_parameters, layout.swap_optimizer))
        for states in set(stage_states(shape, layout, options))
    )


def engine_room_bytes(engine: EngineMemory, layout: Layout, resident: float | None, gpu_bytes: float) -> float:
    """What the fullest GPU has left for weights and KV cache of one engine rank in the rollout phase; negative when too little.

    `resident` is what the actor's states take there (`resident_bytes`); None: the engine has its own devices.
    """
    own = engine.workspace_bytes + engine.asleep_bytes
    if resident is None:
        return gpu_bytes - own - NCCL_BYTES_PER_GROUP - MARGIN_BYTES
    return gpu_bytes - with_margin(resident + own - CUDA_CONTEXT_BYTES, layout) - CUDA_CONTEXT_BYTES


def _resident(states: StageStates, swap_parameters: bool, swap_optimizer: bool) -> list[tuple[str, float]]:
    """What of a rank's states is on the device while engines generate."""
    return [
        ("weights", 0.0 if swap_parameters else states.weight_bytes),
        ("gradients", 0.0 if swap_parameters else states.grad_bytes),
        ("optimizer state", 0.0 if swap_optimizer else states.optimizer_bytes),
    ]


def _phases(
    shape: ModelShape,
    layout: Layout,
    options: MemoryOptions,
    gpu_bytes: float,
    stage: int,
    states: StageStates,
    layers: StageLayers,
    engine: EngineMemory | None,
    embedded: EmbeddedMemory | None,
) -> tuple[PhaseMemory, ...]:
    beside = [] if engine is None else [("engine asleep", engine.asleep_bytes)]
    if embedded is not None and layout.embedded is not None and layout.embedded.colocated:
        beside = _embedded_items(embedded, layout.embedded, layout.world_size)
    outside, training = _outside(layout), _train(shape, layout, options, stage, states, layers)
    phases = [
        _phase("train", [*training, *beside], outside, _fragmented_bytes(training, options)),
        _phase("log_probs", [*_log_probs(shape, layout, options, stage, states, layers), *beside], outside),
    ]
    if embedded is not None and layout.embedded is not None and layout.embedded.colocated:
        while_busy = [] if layout.embedded.has_own_process else [("KV cache", embedded.cache_bytes)]
        items = [
            *_resident(states, layout.swap_parameters, layout.swap_optimizer),
            *beside,
            *while_busy,
            ("engine workspace", embedded.workspace_bytes),
        ]
        phases.append(_phase("rollout", items, outside))
    if engine is not None and layout.engine is not None:
        pool = engine.kv_pool_bytes(layout.engine.mem_fraction_static, gpu_bytes)
        swaps = layout.swap_parameters, layout.swap_optimizer
        phases += _phases_beside_engine(engine, pool, states, swaps, options.weight_bucket_bytes, outside)
    return tuple(phases)


@lru_cache(maxsize=16384)
def _phases_beside_engine(
    engine: EngineMemory, pool: float, states: StageStates, swaps: tuple[bool, bool], bucket_bytes: int, outside: int
) -> tuple[PhaseMemory, PhaseMemory]:
    """Rollout and sync of a colocated server: the same for all micro-batches and recompute of a cut."""
    resident = _resident(states, *swaps)
    graphs = engine.asleep_bytes - CUDA_CONTEXT_BYTES
    rollout = [
        *resident,
        ("engine weights", engine.weight_bytes),
        ("KV cache", pool),
        ("engine workspace", engine.workspace_bytes + graphs),
        ("engine context", CUDA_CONTEXT_BYTES),
    ]
    sync = [
        ("weights", states.weight_bytes),
        *resident[1:],
        ("engine weights", engine.weight_bytes),
        ("weight buckets", 2 * bucket_bytes),
        ("engine asleep", engine.asleep_bytes),
    ]
    return _phase("rollout", rollout, outside), _phase("sync", sync, outside)


def _fragmented_bytes(training: list[tuple[str, float]], options: MemoryOptions) -> float:
    """On top of the margin of a phase: for what lives from a forward to a backward pass, or within one."""
    if not options.varying_sizes:
        return 0.0
    return FRAGMENTED_SHARE * sum(num_bytes for name, num_bytes in training if name in _AS_LARGE_AS_A_MICRO_BATCH)


def _phase(phase: Phase, items: list[tuple[str, float]], outside: int, fragmented: float = 0.0) -> PhaseMemory:
    allocated, found = 0.0, []  # loops, not sums of generators: a plan has tens of thousands of phases
    for name, num_bytes in items:
        if num_bytes:
            found.append(MemoryItem(name, round(num_bytes)))
            if name not in _NOT_FRAGMENTED:
                allocated += num_bytes
    found.append(MemoryItem(OUTSIDE, outside))
    found.append(MemoryItem(MARGIN, round(MARGIN_FRACTION * allocated + MARGIN_BYTES + fragmented)))
    return PhaseMemory(phase, tuple(found))


def _train(
    shape: ModelShape, layout: Layout, options: MemoryOptions, stage: int, states: StageStates, layers: StageLayers
) -> list[tuple[str, float]]:
    tokens, is_last = layout.tokens_per_rank, stage == layout.pipeline_parallel_size - 1
    passes = passes_in_flight(stage, layout.pipeline_parallel_size, layout.num_chunks, layout.num_micro_batches)
    attention = mlp = experts = inputs = workspace = 0.0
    for has_experts, counts in ((False, layers.dense), (True, layers.moe)):
        held = sum(count * number for count, number in zip(counts, passes, strict=True))
        mtp = shape.num_mtp_layers if is_last and shape.moe_layers[-1] is has_experts else 0
        if not held and not mtp:
            continue
        layer = layer_activations(shape, has_experts, layout, options)
        kept, recomputed = _held(layer, counts, passes, layout)
        attention += layer.attention * (kept + mtp)
        mlp += layer.mlp * (kept + mtp)
        experts += layer.experts * (kept + mtp)
        # A multi-token-prediction layer also keeps both its inputs, normed, and their concatenation.
        inputs += layer.input * (recomputed + 4 * mtp)
        live = layer.kept * (layout.recompute.num_layers if layout.recompute.method == "uniform" else 1) if recomputed else 0.0
        workspace = max(workspace, layer.transient + layer.recomputed + live)
    head = head_memory(shape, layout, options) if is_last else HeadMemory(0.0, 0.0)
    lasting, passing = (states.linear_grad_bytes, 0.0) if options.fused_grad_accumulation else (0.0, states.linear_grad_bytes)
    return [
        ("weights", states.weight_bytes),
        ("gradients", states.grad_bytes),
        ("optimizer state", states.optimizer_bytes),
        ("activations: attention", attention * tokens),
        ("activations: MLP", mlp * tokens),
        ("activations: experts", experts * tokens),
        ("activations: layer inputs", inputs * tokens),
        ("LM head and loss", head.kept_bytes + head.workspace_bytes),
        ("backward workspace", max(0.0, workspace * tokens + passing - head.workspace_bytes)),
        ("gradient buffers of linear layers", lasting),
    ]


def _held(layer: LayerActivations, counts: tuple[int, ...], passes: tuple[int, ...], layout: Layout) -> tuple[float, float]:
    """Layers in flight that keep everything, and inputs of layers (or of groups of them) that full recompute keeps instead."""
    recompute = layout.recompute
    in_flight = sum(count * number for count, number in zip(counts, passes, strict=True))
    if recompute.granularity != "full":
        return in_flight, 0.0
    if recompute.method == "uniform":
        return 0.0, in_flight / recompute.num_layers
    recomputed = sum(min(count, recompute.num_layers) * number for count, number in zip(counts, passes, strict=True))
    return in_flight - recomputed, recomputed


def _log_probs(
    shape: ModelShape, layout: Layout, options: MemoryOptions, stage: int, states: StageStates, layers: StageLayers
) -> list[tuple[str, float]]:
    tokens, is_last = layout.tokens_per_rank, stage == layout.pipeline_parallel_size - 1
    kinds = [has_experts for has_experts, counts in ((False, layers.dense), (True, layers.moe)) if sum(counts)]
    of_kinds = [layer_activations(shape, has_experts, layout, options) for has_experts in kinds]
    # Without a backward pass a part's tensors die with it: at most those of one part, and the residual.
    forward = max((layer.input + max(layer.attention, layer.mlp, layer.experts) for layer in of_kinds), default=0.0) * tokens
    head = log_prob_workspace(shape, layout, options) if is_last else 0.0
    return [
        ("weights", states.weight_bytes),
        ("gradients", states.grad_bytes),
        ("optimizer state", states.optimizer_bytes),
        ("forward workspace", forward),
        ("LM head and loss", max(0.0, head - forward)),
    ]


def _embedded_items(memory: EmbeddedMemory, engine: EmbeddedEngine, num_ranks: int) -> list[tuple[str, float]]:
    """What the embedded engines on a rank's device take of it all the time."""
    per_device = math.ceil(engine.num_engines / num_ranks)
    items = [("engine weights", per_device * memory.weight_bytes)]
    if engine.has_own_process:
        items += [("KV cache", per_device * memory.cache_bytes), ("engine context", float(per_device * CUDA_CONTEXT_BYTES))]
    return items


def _embedded_phase(memory: EmbeddedMemory) -> PhaseMemory:
    items = [
        ("engine weights", memory.weight_bytes),
        ("KV cache", memory.cache_bytes),
        ("engine workspace", memory.workspace_bytes),
        (OUTSIDE, CUDA_CONTEXT_BYTES),
        (MARGIN, MARGIN_BYTES),
    ]
    return PhaseMemory("rollout", tuple(MemoryItem(name, round(num_bytes)) for name, num_bytes in items))


def _engine_phase(engine: EngineMemory, pool: float) -> PhaseMemory:
    items = [
        ("engine weights", engine.weight_bytes),
        ("KV cache", pool),
        ("engine workspace", engine.workspace_bytes + engine.asleep_bytes - CUDA_CONTEXT_BYTES),
        (OUTSIDE, CUDA_CONTEXT_BYTES + NCCL_BYTES_PER_GROUP),
        (MARGIN, MARGIN_BYTES),
    ]
    return PhaseMemory("rollout", tuple(MemoryItem(name, round(num_bytes)) for name, num_bytes in items))


def _outside(layout: Layout) -> int:
    groups = (
        1
        + (layout.tensor_parallel_size > 1)
        + (layout.pipeline_parallel_size > 1)
        + (layout.context_parallel_size > 1)
        + (layout.data_parallel_size > 1)
        + (layout.expert_parallel_size > 1)
        + (layout.expert_tensor_parallel_size > 1)
    )
    return CUDA_CONTEXT_BYTES + NCCL_BYTES_PER_GROUP * groups


def _host_items(layout: Layout, options: MemoryOptions, states: tuple[StageStates, ...]) -> tuple[MemoryItem, ...]:
    """Of the node whose ranks are all of the stage with the largest share."""
    ranks = min(options.gpus_per_node, layout.world_size)
    offloaded = max(state.host_optimizer_bytes for state in states)
    swapped = max(
        (state.weight_bytes if layout.swap_parameters else 0.0) + (state.optimizer_bytes if layout.swap_optimizer else 0.0)
        for state in states
    )
    # A save copies what the rank writes before a thread writes it: its weights, once per model copy, and its optimizer shard.
    staged = max(state.weight_bytes + state.optimizer_shard_bytes for state in states)
    # Adam on the host keeps a gradient of its share beside the state.
    gradients = offloaded / 3
    items = (
        ("processes", PROCESS_HOST_BYTES),
        ("optimizer state computed on the host", offloaded + gradients),
        ("weights and optimizer state swapped out", swapped),
        ("copy of a checkpoint being written", staged),
    )
    return tuple(MemoryItem(name, round(num_bytes * ranks)) for name, num_bytes in items if num_bytes)


def _checkpoint(shape: ModelShape, layout: Layout, options: MemoryOptions) -> CheckpointMemory:
    precision, params = options.precision, num_params(shape)
    weights, optimizer = params * precision.weight_bytes, params * (precision.master_bytes + 2 * precision.moment_bytes)
    num_nodes = max(1, layout.world_size // options.gpus_per_node)
    return CheckpointMemory(weights, optimizer, (weights + optimizer) / (options.disk_bytes_per_second * num_nodes))
