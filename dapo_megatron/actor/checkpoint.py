"""Model, optimizer and random streams of all ranks in megatron-core's torch_dist format, which loads under other layouts.

Files of a checkpoint directory: torch_dist files (weights, AdamW moments, fp32 master weights) and `rng/rank_NNNNN.pt`.
Completeness is the caller's matter (`launcher/run_folder.py` writes the marker).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from dapo_megatron.actor.live_weights import SHARDING
from dapo_megatron.actor.policy import Policy


def save(policy: Policy, directory: Path) -> None:
    """Write the checkpoint; collective over all ranks. `directory` must exist and be empty."""
    metadata = _metadata()
    dist_checkpointing.save(
        _state(policy, metadata, is_loading=False),
        str(directory),
        content_metadata={key: value for key, value in metadata.items() if key != "dp_cp_group"},
    )
    (directory / "rng").mkdir(exist_ok=True)
    torch.save(_rng_state(), _rng_file(directory))
    dist.barrier()


def load(policy: Policy, directory: Path) -> None:
    """Read the checkpoint into the policy, under this layout or another; collective over all ranks.

    Random streams are restored when the number of ranks is the one that saved; nothing of the policy draws random numbers
    unless dropout is switched on through `actor.megatron_extra`.
    """
    state = dist_checkpointing.load(_state(policy, _metadata(), is_loading=True), str(directory))
    for index, module in enumerate(policy.modules):
        module.load_state_dict(state[f"model{index}"])
    with torch.no_grad():
        policy.optimizer.load_state_dict(state["optimizer"])
    if len(list((directory / "rng").iterdir())) == dist.get_world_size():
        streams = torch.load(_rng_file(directory), weights_only=True)
        torch.set_rng_state(streams["torch"])
        get_cuda_rng_tracker().set_states(streams["tracker"])
    dist.barrier()


def _state(policy: Policy, metadata: dict[str, Any], *, is_loading: bool) -> dict[str, Any]:
    models = {f"model{i}": module.sharded_state_dict(metadata=metadata) for i, module in enumerate(policy.modules)}
    # One chunk is passed bare: megatron-core 0.19.2 looks for "model0", "model1", ... only under interleaving.
    of_optimizer = models["model0"] if len(models) == 1 else models
    return {**models, "optimizer": policy.optimizer.sharded_state_dict(of_optimizer, is_loading=is_loading, metadata=metadata)}


def _metadata() -> dict[str, Any]:
    return {
        **SHARDING,
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def _rng_state() -> dict[str, Any]:
    return {"torch": torch.get_rng_state(), "tracker": get_cuda_rng_tracker().get_states()}


def _rng_file(directory: Path) -> Path:
    return directory / "rng" / f"rank_{dist.get_rank():05d}.pt"
