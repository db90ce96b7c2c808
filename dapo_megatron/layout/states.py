"""Weights, gradients and optimizer state of each pipeline stage."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from dapo_megatron.layout.layout import Layout
from dapo_megatron.layout.memory_records import MemoryOptions
from dapo_megatron.layout.model_shape import ModelShape
from dapo_megatron.layout.parameters import (
    RankParameters,
    embedding_weights,
    head_weights,
    layer_weights,
    local_elements,
    mtp_weights,
    padded_buffer,
    rank_parameters,
)


@dataclass(frozen=True, slots=True)
class StageStates:
    """Of one rank of a stage, the mean over its data-parallel copies."""

    num_params: int
    weight_bytes: float
    grad_bytes: float
    optimizer_bytes: float
    """On the device."""
    host_optimizer_bytes: float
    """In host memory, where Adam runs there (`optimizer_offload_fraction`)."""
    optimizer_shard_bytes: float
    """On the device and in host memory together."""
    linear_grad_bytes: float
    """Low-precision gradients of linear layers. Where TransformerEngine adds gradients up itself it keeps one of each distinct matrix;
    elsewhere the largest is there for a moment, of experts those of a layer together."""


@dataclass(frozen=True, slots=True)
class StageLayers:
    """How many layers without and with experts each model chunk of a stage has."""

    dense: tuple[int, ...]
    moe: tuple[int, ...]


def stage_layers(shape: ModelShape, layout: Layout, options: MemoryOptions) -> tuple[StageLayers, ...]:
    """[stage], as `options.layers` says or else as megatron-core cuts the model."""
    given = options.layers
    return _stage_layers(shape.moe_layers, layout.layers_of(shape.num_layers) if given is None else given)


@lru_cache(maxsize=4096)
def _stage_layers(moe_layers: tuple[bool, ...], layers: tuple[tuple[range, ...], ...]) -> tuple[StageLayers, ...]:
    counts = [[sum(moe_layers[layer] for layer in chunk) for chunk in chunks] for chunks in layers]
    return tuple(
        StageLayers(tuple(len(chunk) - moe for chunk, moe in zip(chunks, moes, strict=True)), tuple(moes))
        for chunks, moes in zip(layers, counts, strict=True)
    )


def stage_states(shape: ModelShape, layout: Layout, options: MemoryOptions) -> tuple[StageStates, ...]:
    """[stage]. Independent of micro-batches and recompute."""
    return _stage_states(
        shape,
        stage_layers(shape, layout, options),
        layout.tensor_parallel_size,
        layout.expert_parallel_size,
        layout.expert_tensor_parallel_size,
        layout.data_parallel_size * layout.context_parallel_size,
        layout.expert_data_parallel_size,
        layout.use_distributed_optimizer,
        layout.optimizer_offload_fraction,
        options,
    )


@lru_cache(maxsize=4096)
def _stage_states(
    shape: ModelShape,
    layers: tuple[StageLayers, ...],
    tp: int,
    ep: int,
    etp: int,
    num_shards: int,
    num_expert_shards: int,
    distributed: bool,
    offload_fraction: float,
    options: MemoryOptions,
) -> tuple[StageStates, ...]:
    made: dict[tuple[StageLayers, bool, bool], StageStates] = {}
    stages = []
    for stage, counts in enumerate(layers):
        kind = counts, stage == 0, stage == len(layers) - 1
        if kind not in made:  # the stages in the middle are mostly alike
            held = _held(shape, *kind, tp, ep, etp, options)
            made[kind] = _states(held, num_shards, num_expert_shards, distributed, offload_fraction, options)
        stages.append(made[kind])
    return tuple(stages)


@dataclass(frozen=True, slots=True)
class _Held:
    """Elements that a rank of a stage holds, whatever the number of copies of the model."""

    chunks: tuple[RankParameters, ...]
    layers: _Layers
    linear_grads: int


@lru_cache(maxsize=4096)
def _held(
    shape: ModelShape, counts: StageLayers, is_first: bool, is_last: bool, tp: int, ep: int, etp: int, options: MemoryOptions
) -> _Held:
    layout = Layout(tensor_parallel_size=tp, expert_parallel_size=ep, expert_tensor_parallel_size=etp)
    last_chunk = len(counts.moe) - 1
    chunks = tuple(
        _chunk(shape, dense, moe, options, layout, first=is_first and chunk == 0, last=is_last and chunk == last_chunk)
        for chunk, (dense, moe) in enumerate(zip(counts.dense, counts.moe, strict=True))
    )
    return _Held(chunks, _layer_elements(shape, counts, layout, options), _linear_grad_elements(shape, counts, layout, options))


def _chunk(
    shape: ModelShape, num_dense: int, num_moe: int, options: MemoryOptions, layout: Layout, *, first: bool, last: bool
) -> RankParameters:
    """What a rank holds of one model chunk."""
    vocab = shape.padded_vocab_size(options.vocab_multiple * layout.tensor_parallel_size)
    held = RankParameters()
    for has_experts, count in ((False, num_dense), (True, num_moe)):
        if count:
            held += rank_parameters(layer_weights(shape, has_experts, options.kernels), layout) * count
    if first:
        held += rank_parameters(embedding_weights(shape, vocab), layout)
    if last:
        head = head_weights(shape, vocab)
        held += rank_parameters(head[:-1] if shape.tied and first else head, layout)
        if shape.num_mtp_layers:
            held += rank_parameters(mtp_weights(shape, options.kernels), layout) * shape.num_mtp_layers
            held += RankParameters() if first else rank_parameters(embedding_weights(shape, vocab), layout)
    return held


@dataclass(frozen=True, slots=True)
class _Layers:
    """Elements of a stage's largest layer and of all its layers, as a rank holds them."""

    largest_layer: int
    in_layers: int


def _layer_elements(shape: ModelShape, layers: StageLayers, layout: Layout, options: MemoryOptions) -> _Layers:
    numbers = [(False, sum(layers.dense)), (True, sum(layers.moe))]
    sizes = [
        (rank_parameters(layer_weights(shape, has_experts, options.kernels), layout).total, number)
        for has_experts, number in numbers
        if number
    ]
    return _Layers(max((size for size, _ in sizes), default=0), sum(size * number for size, number in sizes))


def _linear_grad_elements(shape: ModelShape, layers: StageLayers, layout: Layout, options: MemoryOptions) -> int:
    kinds = [has_experts for has_experts, counts in ((False, layers.dense), (True, layers.moe)) if sum(counts)]
    weights = {
        weight for has_experts in kinds for weight in layer_weights(shape, has_experts, options.kernels) if weight.columns > 1
    }
    if options.fused_grad_accumulation:
        return sum({(weight.rows, weight.columns, weight.split): local_elements(weight, layout) for weight in weights}.values())
    return max((rank_parameters((weight,), layout).total for weight in weights), default=0)


def _states(
    stage: _Held,
    num_shards: int,
    num_expert_shards: int,
    distributed: bool,
    offload_fraction: float,
    options: MemoryOptions,
) -> StageStates:
    precision, ranks, unit = options.precision, stage.chunks, stage.layers
    dense, expert = sum(rank.dense for rank in ranks), sum(rank.expert for rank in ranks)
    held: float = dense + expert
    if distributed:
        held = sum(
            padded_buffer(rank.aligned_dense, num_shards) + padded_buffer(rank.aligned_expert, num_expert_shards)
            for rank in ranks
        )
    sharded = distributed or options.fully_sharded
    shard = dense / num_shards + expert / num_expert_shards if sharded else dense + expert
    optimizer = shard * (precision.master_bytes + 2 * precision.moment_bytes)
    in_linear_layers: float = unit.in_layers
    whole_weights = whole_grads = 0
    if options.fully_sharded:
        # Whole are the layer at work, the next one, embedding and LM head; and the gradient of one of these.
        held, ends = shard, dense + expert - unit.in_layers
        whole_weights, whole_grads = 2 * unit.largest_layer + ends, max(unit.largest_layer, ends // 2)
        in_linear_layers = unit.in_layers * shard / (dense + expert) + 2 * unit.largest_layer
    return StageStates(
        num_params=dense + expert,
        weight_bytes=precision.weight_bytes * (held + whole_weights) + precision.linear_copy_bytes * in_linear_layers,
        grad_bytes=precision.grad_bytes * (held + whole_grads),
        optimizer_bytes=optimizer * (1 - offload_fraction),
        host_optimizer_bytes=optimizer * offload_fraction,
        optimizer_shard_bytes=optimizer,
        linear_grad_bytes=precision.weight_bytes * stage.linear_grads,
    )
