"""The layouts that `plan` looks at: every way to cut a model over the actor's ranks, before micro-batches, recompute and offload.

Tensor parallelism stays within one NVLink domain; context parallelism leaves a rank 1,024 tokens of the longest sequence at least.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain

from dapo_megatron.config.layout_rules import ModelSizes, divisors, model_problems, rank_problems
from dapo_megatron.layout.flops import attention_projection_flops, head_flops, mlp_flops
from dapo_megatron.layout.layout import FULL_RECOMPUTE, NO_RECOMPUTE, Layout, Recompute, RecomputedPart
from dapo_megatron.layout.model_shape import GroupedQueryAttention, LatentAttention, ModelShape
from dapo_megatron.layout.plan import PlanRequest, Rejection

MAX_PIPELINE_STAGES = 64
MAX_CONTEXT_PARALLEL_SIZE = 32
MIN_TOKENS_OF_CONTEXT_RANK = 1024
MAX_CHUNK_CHOICES = 4
MICRO_BATCH_STEPS = (1, 2, 4)
"""Token limits of a micro-batch, in multiples of the longest sequence."""
TOKEN_GRID = 1024
WORST_STAGE = 1.5
"""Work of the slowest of uneven stages over the mean, above which a pipeline is not looked at."""


def cuts(request: PlanRequest) -> Iterator[Layout | Rejection]:
    """Layouts that obey the rules, and one rejection for each that does not."""
    model, world = request.model, request.num_actor_gpus
    sizes = model_sizes(request)
    for tensor in _powers_of_two(min(world, request.gpu.nvlink_domain_gpus)):
        if world % tensor:
            continue
        whole = _cut(request, tensor, 1, 1, 1, 1)
        if problem := _first_problem(whole, sizes):
            yield Rejection(whole, "rule", problem)
            continue
        for pipeline in divisors(world // tensor, min(MAX_PIPELINE_STAGES, model.num_layers)):
            for context in _powers_of_two(min(world // tensor // pipeline, MAX_CONTEXT_PARALLEL_SIZE)):
                if world % (tensor * pipeline * context) == 0:
                    yield from _with_experts(request, sizes, tensor, pipeline, context)


def recompute_choices(model: ModelShape) -> tuple[Recompute, ...]:
    """From nothing to everything: each keeps less and computes more than the one before."""
    named: list[frozenset[RecomputedPart]] = [frozenset(("layernorm",))]
    if isinstance(model.attention, LatentAttention):
        named.append(named[-1] | {"mla_up_proj"})
    kept = named[-1]
    if any(model.moe_layers):
        named += [kept | {"moe_act"}, kept | {"moe"}]
    else:
        named.append(kept | {"mlp"})
    return (NO_RECOMPUTE, *(Recompute("selective", modules) for modules in named), FULL_RECOMPUTE)


def token_limits(request: PlanRequest, layout: Layout) -> tuple[int, ...]:
    """Ascending limits of a micro-batch that make a difference: the first that takes a rank's whole share is the last."""
    workload = request.workload
    share = workload.num_samples_per_update * workload.sequence_tokens / layout.data_parallel_size
    limits: list[int] = []
    for step in MICRO_BATCH_STEPS:
        limit = -(-workload.max_sequence_tokens * step // TOKEN_GRID) * TOKEN_GRID
        limits.append(limit)
        if limit >= share / layout.pipeline_parallel_size:
            break
    return tuple(limits)


def model_sizes(request: PlanRequest) -> ModelSizes:
    """The model in the words of the rules."""
    model, attention = request.model, request.model.attention
    heads = {"num_attention_heads": attention.num_heads}
    if isinstance(attention, GroupedQueryAttention):
        heads["num_key_value_heads"] = attention.num_groups
    return ModelSizes(
        name=request.model_name,
        num_layers=model.num_layers,
        heads=heads,
        widths={} if all(model.moe_layers) else {"intermediate_size": model.ffn_hidden_size},
        has_experts=model.experts is not None,
        num_experts=model.experts.num_experts if model.experts else None,
        expert_width=model.experts.ffn_hidden_size if model.experts else None,
    )


def rule_problem(request: PlanRequest, layout: Layout) -> str | None:
    """The first rule that a layout breaks, in the words of the configuration; None when it obeys all."""
    samples = request.workload.num_samples_per_update
    if layout.data_parallel_size > samples:
        return (
            f"data-parallel size ({layout.data_parallel_size}) must not exceed the samples of an optimizer step ({samples:g}): the other "
            "ranks would train on nothing; cut the model over more ranks, or raise train.num_prompts_per_step."
        )
    return _first_problem(layout, model_sizes(request))


def release_problem(layout: Layout) -> str | None:
    """Why this version cannot run a layout; None when it can."""
    if layout.optimizer_offload_fraction:
        return "an optimizer that computes in host memory is not part of this version; use actor.offload, or more ranks."
    if layout.swap_optimizer != layout.swap_parameters:
        return "actor.offload moves optimizer and parameters together; use both or none."
    return None


def _with_experts(
    request: PlanRequest, sizes: ModelSizes, tensor: int, pipeline: int, context: int
) -> Iterator[Layout | Rejection]:
    experts = request.model.experts
    choices = [(1, 1)]
    if experts is not None:
        ranks = request.num_actor_gpus // pipeline
        expert_tensors = (1, tensor) if tensor > 1 else (1,)
        choices = [
            (expert, expert_tensor)
            for expert_tensor in expert_tensors
            for expert in divisors(experts.num_experts, ranks // expert_tensor)
        ]
    for expert, expert_tensor in choices:
        layout = _cut(request, tensor, pipeline, context, expert, expert_tensor)
        if request.workload.max_sequence_tokens // context < MIN_TOKENS_OF_CONTEXT_RANK and context > 1:
            return
        yield from _with_stages(request, sizes, layout)


def _with_stages(request: PlanRequest, sizes: ModelSizes, layout: Layout) -> Iterator[Layout | Rejection]:
    num_layers, pipeline = request.model.num_layers, layout.pipeline_parallel_size
    problem = rule_problem(request, layout)
    if problem:
        yield Rejection(layout, "rule", problem)
        if num_layers % pipeline == 0:
            return
    else:
        yield layout
    if pipeline == 1:
        return
    if num_layers % pipeline == 0:
        for chunks in _some([chunks for chunks in divisors(num_layers // pipeline) if chunks > 1]):
            yield replace(layout, virtual_pipeline_size=chunks)
    for first, last in _uneven(request.model, pipeline):
        uneven = replace(layout, num_layers_in_first_pipeline_stage=first, num_layers_in_last_pipeline_stage=last)
        if not rule_problem(request, uneven):
            yield uneven
            per_stage = uneven.layers_per_stage(num_layers)
            for chunks in _some([n for n in divisors(min(per_stage)) if n > 1 and not any(count % n for count in per_stage)]):
                yield replace(uneven, virtual_pipeline_size=chunks)


def _uneven(model: ModelShape, num_stages: int) -> list[tuple[int, int]]:
    """First and last stage, the best two numbers of layers in the middle; the last stage holds the LM head too."""
    layer = attention_projection_flops(model) + mlp_flops(model, model.moe_layers[-1])
    head, num_layers = head_flops(model) / layer, model.num_layers
    even = (num_layers + head) / num_stages
    found = []
    middles = {math.floor(even), math.ceil(even), math.ceil(even) + 1} if num_stages > 2 else {0}
    for middle in middles:
        left = num_layers - middle * (num_stages - 2)
        splits = [(left - last, last) for last in range(1, left)]
        if splits and (middle or num_stages == 2):
            first, last = min(splits, key=lambda split: max(split[0], split[1] + head))
            slowest = max(first, last + head, middle)
            if not first == last == (middle or first) and slowest <= WORST_STAGE * even:
                found.append((slowest, first, last))
    return [(first, last) for _, first, last in sorted(found)[:2]]


def _some(choices: list[int]) -> list[int]:
    """All of a few; of many the smallest and the largest."""
    return choices if len(choices) <= MAX_CHUNK_CHOICES else [*choices[: MAX_CHUNK_CHOICES - 1], choices[-1]]


def _cut(request: PlanRequest, tensor: int, pipeline: int, context: int, expert: int, expert_tensor: int) -> Layout:
    return Layout(
        tensor_parallel_size=tensor,
        pipeline_parallel_size=pipeline,
        context_parallel_size=context,
        expert_parallel_size=expert,
        expert_tensor_parallel_size=expert_tensor,
        data_parallel_size=request.num_actor_gpus // (tensor * pipeline * context),
        sequence_parallel=tensor > 1,
    )


def _first_problem(layout: Layout, sizes: ModelSizes) -> str | None:
    return next(chain(rank_problems(layout), model_problems(layout, sizes, pad_query_groups=False)), None)


def _powers_of_two(limit: int) -> list[int]:
    return [1 << exponent for exponent in range(limit.bit_length())]
