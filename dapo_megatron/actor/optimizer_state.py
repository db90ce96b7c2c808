"""The optimizer's part of a checkpoint, in megatron-core's fully reshardable form: a tensor per parameter, shaped like it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, param_group_identifier_keys

from dapo_megatron.types import CheckpointError

SHARDING_TYPE = "fully_reshardable"


def optimizer_state(optimizer: MegatronOptimizer, models: dict[str, Any], *, is_loading: bool) -> dict[Any, Any]:
    """Sharded state of the optimizer; collective. `models`: the chunks' sharded states under "model0", "model1", ..."""
    # One chunk is passed bare: megatron-core 0.19.2 looks for "model0", "model1", ... only under interleaving.
    of_model = models["model0"] if len(models) == 1 else models
    metadata = {
        "distrib_optim_sharding_type": SHARDING_TYPE,
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


def in_parts_of(optimizer: MegatronOptimizer, loaded: Mapping[Any, Any]) -> dict[Any, Any]:
    """The loaded state as this optimizer takes it, also where the one that saved it consisted of other parts.

    megatron-core 0.19.2 has an optimizer of its own for experts that other ranks share than share the rest. Tensors have the same names in
    any number of parts; parameter groups, with the number of steps, lie by part, and of those only `is_expert_parallel` differs.
    CheckpointError when a group has no counterpart.
    """
    numbered = {key: value for key, value in loaded.items() if isinstance(key, int)}
    alone = {key: value for key, value in loaded.items() if not isinstance(key, int)}
    if not (numbered and alone):
        return dict(loaded)
    parts = parts_of(optimizer)
    saved, own = ([alone], numbered) if len(parts) > 1 else (numbered.values(), {0: alone})
    groups = [group for state in saved for group in state.get("optimizer", state)["param_groups"]]
    for part, state in zip(parts, own.values(), strict=True):
        if isinstance(part, DistributedOptimizer):
            state["param_state_sharding_type"] = SHARDING_TYPE
            state["optimizer"] = {"param_groups": [{} for _ in part.param_groups]}
        of_torch = state.get("optimizer", state)
        own_groups = zip(part.param_groups, of_torch["param_groups"], strict=True)
        of_torch["param_groups"] = [_counterpart(group, groups) | of_group for group, of_group in own_groups]
    return own if len(parts) > 1 else alone


def _counterpart(group: Mapping[str, Any], saved: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What was saved of the parameters that are treated as those of `group`, without naming them."""
    names = [name for name in param_group_identifier_keys if name != "is_expert_parallel"]
    for other in saved:
        if all(other.get(name) == group.get(name) for name in names):
            settings = {name: value for name, value in other.items() if name != "params"}
            return settings | {"is_expert_parallel": group["is_expert_parallel"]}
    raise CheckpointError(
        "the optimizer state has no parameters that are treated as those of this run; use the settings of the run that saved it"
    )


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
