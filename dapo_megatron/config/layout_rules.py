"""Rules of a parallel layout: what `checks.py` holds a run's actor against, and `plan` every layout that it enumerates."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from dapo_megatron.config.fields import either


class LayoutSizes(Protocol):
    """The sizes of a layout by their names in the configuration."""

    @property
    def tensor_parallel_size(self) -> int: ...
    @property
    def pipeline_parallel_size(self) -> int: ...
    @property
    def virtual_pipeline_size(self) -> int | None: ...
    @property
    def num_layers_in_first_pipeline_stage(self) -> int | None: ...
    @property
    def num_layers_in_last_pipeline_stage(self) -> int | None: ...
    @property
    def expert_parallel_size(self) -> int: ...
    @property
    def expert_tensor_parallel_size(self) -> int: ...
    @property
    def sequence_parallel(self) -> bool: ...
    @property
    def model_parallel_size(self) -> int: ...
    @property
    def world_size(self) -> int: ...


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """What of a model a layout divides, by the names in config.json. `name` is how messages call the model."""

    name: str
    num_layers: int | None
    heads: Mapping[str, int] = field(default_factory=dict)
    """Attention heads and groups of keys and values, as far as known."""
    widths: Mapping[str, int] = field(default_factory=dict)
    """Of MLPs in layers without experts."""
    has_experts: bool | None = None
    """None: unknown."""
    num_experts: int | None = None
    expert_width: int | None = None
    expert_width_field: str = "moe_intermediate_size"


def rank_problems(layout: LayoutSizes) -> Iterator[str]:
    """What can be said without the model."""
    if layout.world_size % layout.model_parallel_size:
        multiples = [layout.model_parallel_size * copies for copies in (1, 2, 4)]
        yield (
            f"actor.num_ranks ({layout.world_size}) must be a multiple of tensor x pipeline x context parallel size "
            f"({layout.model_parallel_size}); use {either(multiples)}."
        )
    if layout.virtual_pipeline_size is not None and layout.pipeline_parallel_size == 1:
        yield (
            f"actor.virtual_pipeline_size ({layout.virtual_pipeline_size}) needs actor.pipeline_parallel_size > 1 (now 1); "
            "raise it, or set actor.virtual_pipeline_size to null."
        )
    if layout.pipeline_parallel_size == 1:
        for name, count in uneven_stages(layout).items():
            yield f"{name} ({count}) needs actor.pipeline_parallel_size > 1 (now 1); raise it, or set {name} to null."
    if layout.sequence_parallel and layout.tensor_parallel_size == 1:
        yield (
            "actor.sequence_parallel (true) needs actor.tensor_parallel_size > 1 (now 1); raise it, or set "
            "actor.sequence_parallel to false."
        )


def model_problems(layout: LayoutSizes, model: ModelSizes, *, pad_query_groups: bool) -> Iterator[str]:
    """How heads, widths, experts and layers divide over the ranks. Source: megatron-core 0.19.2, TransformerConfig.__post_init__."""
    sizes = ({} if pad_query_groups else dict(model.heads)) | dict(model.widths)
    common = math.gcd(*sizes.values())
    for name, size in sizes.items():
        if size % layout.tensor_parallel_size:
            yield (
                f"actor.tensor_parallel_size ({layout.tensor_parallel_size}) must divide {name} ({size}) of {model.name}; "
                f"use {either(divisors(common, limit=64))}" + (", or set actor.pad_query_groups." if name in model.heads else ".")
            )
    yield from _expert_problems(layout, model)
    if model.num_layers is not None:
        yield from _stage_problems(layout, model.num_layers, model.name)


def uneven_stages(layout: LayoutSizes) -> dict[str, int]:
    """The stages whose number of layers is given, by the name of the setting."""
    counts = {
        f"actor.num_layers_in_{end}_pipeline_stage": getattr(layout, f"num_layers_in_{end}_pipeline_stage")
        for end in ("first", "last")
    }
    return {name: count for name, count in counts.items() if count is not None}


def divisors(number: int, limit: int | None = None) -> list[int]:
    """Ascending, up to `limit`."""
    return [divisor for divisor in range(1, min(number, limit or number) + 1) if number % divisor == 0]


def _expert_problems(layout: LayoutSizes, model: ModelSizes) -> Iterator[str]:
    expert, expert_tensor = layout.expert_parallel_size, layout.expert_tensor_parallel_size
    if model.has_experts is False:
        for name, size in (("expert_parallel_size", expert), ("expert_tensor_parallel_size", expert_tensor)):
            if size > 1:
                yield f"actor.{name} ({size}) must be 1: {model.name} has no experts; remove it."
        return
    if model.num_experts is not None and model.num_experts % expert:
        yield (
            f"actor.expert_parallel_size ({expert}) must divide num_experts ({model.num_experts}) of {model.name}; "
            f"use {either(divisors(model.num_experts))}."
        )
    if model.expert_width is not None and model.expert_width % expert_tensor:
        yield (
            f"actor.expert_tensor_parallel_size ({expert_tensor}) must divide {model.expert_width_field} "
            f"({model.expert_width}) of {model.name}; use {either(divisors(model.expert_width, limit=64))}."
        )
    if model.has_experts and layout.world_size % (layout.pipeline_parallel_size * expert * expert_tensor):
        yield (
            f"actor.pipeline_parallel_size x expert_parallel_size x expert_tensor_parallel_size ({layout.pipeline_parallel_size} x "
            f"{expert} x {expert_tensor}) must divide the actor's ranks ({layout.world_size}); make one of them smaller."
        )
    if model.has_experts and layout.tensor_parallel_size > 1 and not layout.sequence_parallel:
        yield (
            f"actor.sequence_parallel must be true with actor.tensor_parallel_size ({layout.tensor_parallel_size}) > 1 for a model "
            f"with experts ({model.name}); set it."
        )


def _stage_problems(layout: LayoutSizes, num_layers: int, model: str) -> Iterator[str]:
    """How layers divide over pipeline stages and, under interleaving, over the chunks of each stage."""
    given = uneven_stages(layout)
    num_stages, num_chunks = layout.pipeline_parallel_size, layout.virtual_pipeline_size or 1
    if not given:
        if num_layers % (num_stages * num_chunks):
            product = "actor.pipeline_parallel_size" + (" x actor.virtual_pipeline_size" if layout.virtual_pipeline_size else "")
            yield (
                f"{product} ({num_stages * num_chunks}) must divide num_hidden_layers ({num_layers}) of {model}; "
                f"use {either(divisors(num_layers))}, or uneven stages (actor.num_layers_in_first_pipeline_stage, ..._last_...)."
            )
        return
    if num_stages == 1:
        return
    words = " and ".join(f"{name} ({count})" for name, count in given.items())
    left, stages_left = num_layers - sum(given.values()), num_stages - len(given)
    if left < stages_left or (left % stages_left if stages_left else left):
        must = f"a positive multiple of {stages_left}, for the other stages" if stages_left else "none: there is no other stage"
        yield f"{words} must leave {must}, but {left} of num_hidden_layers ({num_layers}) of {model} are left; change a number."
        return
    per_stage = given | ({"layers of each other stage": left // stages_left} if stages_left else {})
    for name, count in per_stage.items():
        if count % num_chunks:
            yield (
                f"actor.virtual_pipeline_size ({num_chunks}) must divide {name} ({count}): every stage is cut into that many "
                "chunks; change one of the two."
            )
