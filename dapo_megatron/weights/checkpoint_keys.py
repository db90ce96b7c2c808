"""Names of tensors in a checkpoint of megatron-core, which stacks equal tensors of layers and experts under one key.

A stacked tensor has the layer, the expert or both as leading axes:

    decoder.layers.3.mlp.experts.experts.5.linear_fc1.weight     the mapping's name, one tensor an expert
    decoder.layers.3.mlp.experts.experts.linear_fc1.weight       [num_experts, rows, columns] at [5]: experts are always stacked
    decoder.layers.mlp.experts.experts.linear_fc1.weight         [num_layers, num_experts, rows, columns] at [3, 5]

megatron-core 0.19.2 stacks layers unless its metadata say `non_homogeneous_layers` or `moe_layer_freq` is a list or above 1.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from dapo_megatron.types import MappingError
from dapo_megatron.weights.plan import ModelMapping

_NUMBERS = re.compile(r"(?<=^decoder\.layers\.)(?P<layer>\d+)\.|(?<=\.experts\.experts\.)(?P<expert>\d+)\.")
_GAPS = re.compile(r"(?:^decoder\.layers|\.experts\.experts)\.(?!\d)")


@dataclass(frozen=True, slots=True)
class CheckpointPlace:
    """Where a tensor lies in a checkpoint: at `index` of the leading `axes` of the tensor `key`; both empty when not stacked."""

    key: str
    index: tuple[int, ...]
    axes: tuple[int, ...]


def checkpoint_places(mapping: ModelMapping, *, stacked_layers: bool) -> dict[str, CheckpointPlace]:
    """Every tensor of the mapping, under the names that the TransformerEngine layer spec gives.

    There a norm has the name of the linear it is fused into, where the layer has that linear.
    """
    num_layers, num_experts = (_count(mapping, group) for group in ("layer", "expert"))
    places = {}
    for name in mapping.tensors:
        index, axes = [], []
        for match in _NUMBERS.finditer(name):
            if match["expert"] is not None or stacked_layers:
                index.append(int(match["expert"] or match["layer"]))
                axes.append(num_layers if match["expert"] is None else num_experts)
        key = _fused_name(mapping, name)
        key = _NUMBERS.sub(lambda match: "" if match["expert"] or stacked_layers else match[0], key)
        places[name] = CheckpointPlace(key, tuple(index), tuple(axes))
    return places


def num_stacked_axes(key: str) -> int:
    """Leading axes of the tensor of that name: one for each number, of a layer or an expert, that the name leaves out."""
    return len(_GAPS.findall(key))


def unstacked_name(key: str, index: Sequence[int]) -> str:
    """The name of one tensor out of a stacked one, in the spelling of `key`: `ModelMapping.canonical_name` understands it.

    MappingError when `index` has not one number for each layer and expert that the key leaves out.
    """
    numbers = list(index)
    gaps = num_stacked_axes(key)
    if gaps != len(numbers):
        raise MappingError(f"{key} is stacked over {len(numbers)} axes, its name leaves out {gaps}; it is not megatron-core's")
    return _GAPS.sub(lambda match: f"{match[0]}{numbers.pop(0)}.", key)


def _count(mapping: ModelMapping, group: str) -> int:
    found = (match[group] for name in mapping.tensors for match in _NUMBERS.finditer(name))
    return max((int(number) + 1 for number in found if number is not None), default=0)


def _fused_name(mapping: ModelMapping, name: str) -> str:
    for fused_ending, ending in mapping.aliases.items():
        if name.endswith(ending):
            fused = name.removesuffix(ending) + fused_ending
            if fused.removesuffix(".layer_norm_weight") + ".weight" in mapping.tensors:
                return fused
    return name
