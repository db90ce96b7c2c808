"""The parameters of live ranks as boxes in megatron-core's global coordinates, and loading an HF directory into them.

megatron-core itself is asked where each local tensor lies (`sharded_state_dict`), so no layout is known here.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from dapo_megatron.weights.checkpoint_keys import unstacked_name
from dapo_megatron.weights.hf_files import HfFiles
from dapo_megatron.weights.plan import Box, ModelMapping, import_plan, padding_slices

SHARDING = {"non_homogeneous_layers": True}
"""megatron-core metadata: a name per layer with its global index, instead of one tensor stacked over layers."""


@dataclass(frozen=True, slots=True)
class LiveBox:
    """A piece of a parameter on this rank: `data` is a view of the parameter's memory, `is_owner` on one rank of its replicas."""

    box: Box
    data: Tensor
    is_owner: bool


def live_boxes(modules: Sequence[GPTModel]) -> list[LiveBox]:
    """Every parameter of this rank's chunks, in a fixed order."""
    return [
        LiveBox(_box(tensor), tensor.data.detach(), is_main_replica(tensor.replica_id))
        for module in modules
        for value in module.sharded_state_dict(metadata=dict(SHARDING)).values()  # a copy: it gets a process group added
        for tensor in _tensors(value)
    ]


def gradient_boxes(modules: Sequence[GPTModel]) -> list[LiveBox]:
    """`live_boxes` with the gradients (fp32, megatron-core's main_grad buffers) as `data`; they stay views of the buffers.

    What is no parameter (the router bias of DeepSeek-V3) has gradient zero.
    """
    parameters = sorted((p for module in modules for p in module.parameters()), key=lambda parameter: parameter.data_ptr())
    starts = [parameter.data_ptr() for parameter in parameters]

    def gradient(data: Tensor) -> Tensor:
        """The part of the gradient that lies where `data` lies in its parameter."""
        parameter = parameters[bisect_right(starts, data.data_ptr()) - 1]
        num_bytes = data.data_ptr() - parameter.data_ptr()
        if not 0 <= num_bytes < parameter.nbytes:
            return torch.zeros_like(data, dtype=torch.float32)
        whole: Tensor = parameter.main_grad
        return whole.as_strided(data.shape, data.stride(), whole.storage_offset() + num_bytes // data.itemsize)

    return [LiveBox(item.box, gradient(item.data), item.is_owner) for item in live_boxes(modules)]


def load_hf(modules: Sequence[GPTModel], mapping: ModelMapping, directory: Path) -> None:
    """Fill this rank's parameters from an HF directory, reading only the slices it holds; padding becomes zero."""
    live = live_boxes(modules)
    files = HfFiles(directory)
    files.check(mapping)
    boxes = [item.box for item in live]
    with torch.no_grad():
        for item in live:
            for padding in padding_slices(mapping, item.box):
                item.data[padding] = 0
        for copy in import_plan(mapping, boxes):
            live[copy.box_index].data[copy.box_slices].copy_(files.read(copy.hf_name, copy.hf_slices))


def _box(tensor: ShardedTensor) -> Box:
    """Experts are stacked: the leading axes of the global shape say which one this is."""
    stacked = tensor.prepend_axis_num
    name = unstacked_name(tensor.key, tensor.global_offset[:stacked])
    return Box(name, tuple(tensor.global_offset[stacked:]), tuple(tensor.local_shape), tuple(tensor.global_shape[stacked:]))


def _tensors(value: Any) -> Iterator[ShardedTensor]:
    """The tensors of one entry; a factory (gated linear_fc1) is built into its pieces, which are views."""
    if isinstance(value, ShardedTensorFactory):
        built = value.build()
        for item in built.values() if isinstance(built, dict) else built:
            yield from _tensors(item)
    elif isinstance(value, ShardedTensor):
        yield value
