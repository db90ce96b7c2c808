"""The optimizer's part of a checkpoint, in megatron-core's fully reshardable form: a tensor per parameter, shaped like it."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from typing import Any

from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer


def optimizer_state(optimizer: MegatronOptimizer, models: dict[str, Any], *, is_loading: bool) -> dict[Any, Any]:
    """Sharded state of the optimizer; collective. `models`: the chunks' sharded states under "model0", "model1", ..."""
    # One chunk is passed bare: megatron-core 0.19.2 looks for "model0", "model1", ... only under interleaving.
    of_model = models["model0"] if len(models) == 1 else models
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    state = optimizer.sharded_state_dict(of_model, is_loading=is_loading, metadata=metadata)
    if not is_loading:
        parts = parts_of(optimizer)
        for index, part in enumerate(parts):
            if isinstance(part, DistributedOptimizer):
                _put_right(part, (state if len(parts) == 1 else state[index])["param_state"])
    return state


def parts_of(optimizer: MegatronOptimizer) -> list[Any]:
    """The optimizers that a chain consists of; itself when it is none."""
    return list(optimizer.chained_optimizers) if isinstance(optimizer, ChainedOptimizer) else [optimizer]


def _put_right(optimizer: DistributedOptimizer, param_state: dict[int, dict[str, Any]]) -> None:
    """Replace the tensors that megatron-core 0.19.2 cuts out at wrong offsets.

    `sharded_param_state_fully_reshardable` cuts parameters out of a gathered buffer at offsets that count the padding between the
    buffer's buckets, but the gathered buffer has none. Only buffers of several buckets are hit: tied embeddings under pipeline
    parallelism have a bucket of their own.
    """
    if all(len(buffer.buckets) == 1 for buffer in optimizer.buffers):
        return
    gathered = optimizer.get_parameter_state_dp_zero(use_gloo_comm=False, return_on_all_ranks=True)
    index = 0
    for number, buffer in enumerate(optimizer.buffers):
        unpadded_offsets = [0, *accumulate(bucket.numel_unpadded for bucket in buffer.buckets)]
        (tensors,) = gathered[number].values()
        for start, end, bucket in buffer.param_index_map.values():
            shift = buffer.buckets[bucket].offset - unpadded_offsets[bucket]
            for key, entry in param_state[index].items():
                whole = tensors[key][start - shift : end - shift]
                param_state[index][key] = replace(entry, data=whole.reshape(entry.data.shape))
            index += 1
