"""Seconds of an optimizer step: pipeline schedule, gradient reduction and optimizer around the layers of `layer_time`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from dapo_megatron.layout.layer_time import NO_TIME, Cut, Machine, Seconds, head_seconds, layer_seconds
from dapo_megatron.layout.layout import NO_RECOMPUTE, Layout, Recompute
from dapo_megatron.layout.model_shape import ModelShape
from dapo_megatron.layout.parameters import RankParameters, embedding_weights, head_weights, layer_weights, rank_parameters
from dapo_megatron.layout.workload import Workload

OPTIMIZER_BYTES_PER_PARAMETER = 34
"""Adam reads gradient, master weight and two moments, writes three of them and the weight; the norm reads the gradient once more."""
HOST_ADAM_PARAMETERS_PER_SECOND = 1.0e9
"""Of the optimizer part in host memory, by a GPU's share of a host's cores; PCIe comes on top."""


@dataclass(frozen=True, slots=True)
class MicroBatches:
    """What one data-parallel rank trains on in one optimizer step."""

    num_micro_batches: int
    tokens_per_micro_batch: float
    """Mean, before context parallelism divides them."""
    mean_square: float
    """Sum of squared sequence lengths over the sum of lengths; of equal sequences their length."""


PACKING_FILL = 0.95
"""Tokens of a full micro-batch over its limit: whole sequences are packed best-fit-decreasing."""


def micro_batches(workload: Workload, layout: Layout, limit: int | None = None) -> MicroBatches:
    """How the samples of one optimizer step become micro-batches of the busiest data-parallel rank.

    `limit` takes the place of the layout's `max_tokens_per_micro_batch`.
    """
    mean_tokens = workload.num_samples_per_update * workload.sequence_tokens / layout.data_parallel_size
    longest = workload.longest_of(workload.num_samples_per_update)
    num_tokens = max(mean_tokens, longest)  # a sequence is never cut: with few samples a rank the longest one decides
    count = math.ceil(num_tokens / ((layout.max_tokens_per_micro_batch if limit is None else limit) * PACKING_FILL))
    if layout.virtual_pipeline_size:
        count = math.ceil(count / layout.pipeline_parallel_size) * layout.pipeline_parallel_size
    return MicroBatches(count, num_tokens / count, workload.mean_square)


@dataclass(frozen=True, slots=True)
class UpdateSeconds:
    """One optimizer step; every field adds to its time."""

    forward: Seconds
    backward: Seconds
    recompute: float
    pipeline_bubble: float
    pipeline_parallel: float
    """Activations and their gradients between stages."""
    data_parallel: float
    """Gradients reduced, parameters gathered, as far as it is waited for."""
    optimizer: float
    held_parameters: float
    """On a rank of the fullest stage; no time."""
    owned_parameters: float
    """Of these, whose optimizer state is on the rank and on its GPU."""
    forward_alone: float
    """Of one micro-batch in a pass without a backward one, as for the old log-probabilities; no part of the step."""
    forward_bubble: float
    """Of such a pass, however many micro-batches it has."""

    @property
    def total(self) -> float:
        """The whole optimizer step."""
        return (
            self.forward.total
            + self.backward.total
            + self.recompute
            + self.pipeline_bubble
            + self.pipeline_parallel
            + self.data_parallel
            + self.optimizer
        )


@dataclass(frozen=True, slots=True)
class _Stage:
    forward: Seconds
    backward: Seconds
    recompute: float
    total: float
    parameters: RankParameters


def update_seconds(
    machine: Machine,
    shape: ModelShape,
    layout: Layout,
    batches: MicroBatches,
    layers: tuple[tuple[range, ...], ...] | None = None,
) -> UpdateSeconds:
    """Forward and backward of all micro-batches, and the optimizer step.

    `layers` are layer numbers by [stage][chunk], for a pipeline that is not cut as megatron-core's sizes say.
    """
    stages = _stages(machine, shape, layout, batches, layers)
    slowest = max(stages, key=lambda stage: stage.total)
    m = batches.num_micro_batches
    # While the pipeline fills and drains, the slowest stage waits for one micro-batch of every other one, or one chunk of it.
    bubble = (sum(stage.total for stage in stages) - slowest.total) / layout.num_chunks
    parameters = max([stage.parameters for stage in stages], key=lambda held: held.total)
    forward, sent = [stage.forward.total for stage in stages], _between_stages(machine, shape, layout, batches)
    return UpdateSeconds(
        forward=slowest.forward * m,
        backward=slowest.backward * m,
        recompute=slowest.recompute * m,
        pipeline_bubble=bubble,
        pipeline_parallel=2 * m * sent,
        data_parallel=_data_parallel(machine, layout, parameters, slowest, m),
        optimizer=_optimizer(machine, layout, parameters),
        held_parameters=parameters.total,
        owned_parameters=_owned(layout, parameters) * (1 - layout.optimizer_offload_fraction),
        forward_alone=max(forward) + sent,
        forward_bubble=(sum(forward) - max(forward)) / layout.num_chunks,
    )


def _stages(
    machine: Machine,
    shape: ModelShape,
    layout: Layout,
    batches: MicroBatches,
    layers: tuple[tuple[range, ...], ...] | None = None,
) -> list[_Stage]:
    """One micro-batch on each stage."""
    tokens, last = batches.tokens_per_micro_batch / layout.context_parallel_size, layout.pipeline_parallel_size - 1
    cut, mean_square, recompute, num_chunks = Cut.of(layout), batches.mean_square, layout.recompute, layout.num_chunks
    counts = layer_counts(shape, layout) if layers is None else _counts_of(shape, layers)
    made: dict[tuple[int, int, bool, bool], _Stage] = {}
    stages = []
    for number, count in enumerate(counts):
        kind = (*count, number == 0, number == last)
        if kind not in made:  # the stages in the middle are mostly alike
            made[kind] = _stage(machine, shape, cut, tokens, mean_square, recompute, num_chunks, *kind)
        stages.append(made[kind])
    return stages


def layer_counts(shape: ModelShape, layout: Layout) -> tuple[tuple[int, int], ...]:
    """[stage]: layers without and with experts."""
    return _layer_counts(shape.moe_layers, layout.layers_per_stage(shape.num_layers), layout.num_chunks)


def _counts_of(shape: ModelShape, layers: tuple[tuple[range, ...], ...]) -> tuple[tuple[int, int], ...]:
    flags = [[shape.moe_layers[layer] for chunk in chunks for layer in chunk] for chunks in layers]
    return tuple((len(stage) - sum(stage), sum(stage)) for stage in flags)


@lru_cache(maxsize=4096)
def _layer_counts(has_experts: tuple[bool, ...], per_stage: tuple[int, ...], num_chunks: int) -> tuple[tuple[int, int], ...]:
    moe, start = [0] * len(per_stage), 0
    for _ in range(num_chunks):
        for stage, count in enumerate(per_stage):
            moe[stage] += sum(has_experts[start : start + count // num_chunks])
            start += count // num_chunks
    return tuple((count - with_experts, with_experts) for count, with_experts in zip(per_stage, moe, strict=True))


@lru_cache(maxsize=200_000)
def _stage(
    machine: Machine,
    shape: ModelShape,
    cut: Cut,
    num_tokens: float,
    mean_square: float,
    recompute: Recompute,
    num_chunks: int,
    num_dense: int,
    num_moe: int,
    is_first: bool,
    is_last: bool,
) -> _Stage:
    forward, backward, again = NO_TIME, NO_TIME, 0.0
    for has_experts, count in ((False, num_dense), (True, num_moe)):
        if count:
            layer = layer_seconds(machine, shape, cut, has_experts, num_tokens, mean_square, recompute)
            forward, backward = forward + layer.forward * count, backward + layer.backward * count
            again += layer.recompute.total * count * _recomputed_share(recompute, num_chunks, num_dense + num_moe)
    if is_last:
        head = head_seconds(machine, shape, cut, num_tokens)
        forward, backward = forward + head.forward, backward + head.backward
        for _ in range(shape.num_mtp_layers):
            extra = layer_seconds(machine, shape, cut, shape.moe_layers[-1], num_tokens, mean_square, NO_RECOMPUTE)
            forward, backward = forward + extra.forward + head.forward, backward + extra.backward + head.backward
    parameters = _held(shape, cut, num_dense, num_moe, is_first, is_last)
    return _Stage(forward, backward, again, forward.total + backward.total + again, parameters)


def _recomputed_share(recompute: Recompute, num_chunks: int, num_layers: int) -> float:
    if recompute.granularity == "full" and recompute.method == "block":
        return min(1.0, recompute.num_layers * num_chunks / num_layers)
    return 1.0


def _between_stages(machine: Machine, shape: ModelShape, layout: Layout, batches: MicroBatches) -> float:
    """Of one micro-batch on one stage, forward or backward. The interleaved schedule sends beside its work, so only a part is waited for."""
    if layout.pipeline_parallel_size == 1:
        return 0.0
    tokens = batches.tokens_per_micro_batch / layout.context_parallel_size
    if layout.sequence_parallel:
        tokens /= layout.tensor_parallel_size
    stride = layout.world_size // layout.pipeline_parallel_size
    once = machine.point_to_point(2 * tokens * shape.hidden_size, stride)
    exposed = 0.25 * layout.num_chunks if layout.virtual_pipeline_size else 1.0
    return once * exposed


@lru_cache(maxsize=50_000)
def _held(shape: ModelShape, cut: Cut, num_dense: int, num_moe: int, has_embedding: bool, has_head: bool) -> RankParameters:
    """Parameters of a rank whose stage has so many layers."""
    layout = Layout(
        tensor_parallel_size=cut.tensor,
        expert_parallel_size=cut.expert,
        expert_tensor_parallel_size=cut.expert_tensor,
    )
    vocab = shape.padded_vocab_size(cut.tensor)
    held = RankParameters()
    for has_experts, count in ((False, num_dense), (True, num_moe)):
        if count:
            held += rank_parameters(layer_weights(shape, has_experts), layout) * count
    if has_embedding:
        held += rank_parameters(embedding_weights(shape, vocab), layout)
    if has_head and not (has_embedding and shape.tied):
        held += rank_parameters(head_weights(shape, vocab), layout)
    return held


def _data_parallel(machine: Machine, layout: Layout, parameters: RankParameters, stage: _Stage, num_micro_batches: int) -> float:
    """Gradients are reduced over all copies of the stage, then bf16 weights gathered (or gradients all-reduced, the same way)."""
    options = machine.options
    dense_copies, expert_copies = layout.data_parallel_size * layout.context_parallel_size, layout.expert_data_parallel_size
    num_bytes = options.grad_bytes + (2 if layout.use_distributed_optimizer else options.grad_bytes)
    if options.fully_sharded:
        num_bytes = num_micro_batches * (2 * 2 + options.grad_bytes)
    seconds = machine.collective(num_bytes * parameters.dense, dense_copies, layout.tensor_parallel_size)
    seconds += machine.collective(
        num_bytes * parameters.expert, expert_copies, layout.expert_parallel_size * layout.expert_tensor_parallel_size
    )
    if not (options.overlap_data_parallel or options.fully_sharded):
        return seconds
    # Reduction runs beside one backward pass, gathering beside one forward pass; the first bucket of each is waited for.
    beside = stage.total * (num_micro_batches if options.fully_sharded else 1)
    return max(0.05 * seconds, seconds - beside)


def _owned(layout: Layout, parameters: RankParameters) -> float:
    """Parameters whose optimizer state is on one rank."""
    if not layout.use_distributed_optimizer:
        return float(parameters.total)
    copies = layout.data_parallel_size * layout.context_parallel_size
    return parameters.dense / copies + parameters.expert / layout.expert_data_parallel_size


def _optimizer(machine: Machine, layout: Layout, parameters: RankParameters) -> float:
    owned = _owned(layout, parameters)
    on_host = owned * layout.optimizer_offload_fraction
    seconds = machine.stream((owned - on_host) * OPTIMIZER_BYTES_PER_PARAMETER, 20)
    seconds += machine.stream(4 * parameters.total)  # gradients set to zero
    if machine.options.precision == "fp8":
        seconds += machine.stream(4 * parameters.total)  # weights read in bf16, written in fp8 as they are and transposed
    if on_host:
        transfer = on_host * (machine.options.grad_bytes + 2) / (machine.gpu.pcie_gb_per_second * 1e9)
        seconds += transfer + on_host / HOST_ADAM_PARAMETERS_PER_SECOND
    return seconds
