"""torch_dist checkpoints as megatron-core itself writes them, of an HF directory, in the forms that are met."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dapo_megatron.config.schema import Config


def save_weights(
    rank: int,
    init_method: str,
    config: Config,
    folder: Path,
    *,
    stacked: bool = False,
    arguments: dict[str, Any] | None = None,
    optimizer: bool = False,
) -> None:
    """Load `config.model.path` on the ranks of `config.actor` and save them to `folder` with one call of megatron-core's `save`.

    `stacked`: one tensor over all layers, as ordinary Megatron-LM saves them, instead of one a layer. `arguments`: what Megatron-LM
    keeps as `args` beside the tensors.
    """
    from megatron.core import dist_checkpointing

    from dapo_megatron.actor.optimizer_state import optimizer_state
    from dapo_megatron.actor.save_strategy import ThreadSaveStrategy
    from dapo_megatron.actor.worker import ActorWorker

    worker = ActorWorker(config, rank=rank, init_method=init_method)
    metadata = {"non_homogeneous_layers": not stacked}
    state: dict[str, Any] = {
        f"model{index}": module.sharded_state_dict(metadata=dict(metadata)) for index, module in enumerate(worker.policy.modules)
    }
    if optimizer:
        optimizer_state(worker.policy.optimizer, dict(state), is_loading=True)  # makes the moments, which a fresh optimizer lacks
        state["optimizer"] = optimizer_state(worker.policy.optimizer, dict(state), is_loading=False)
    if arguments is not None:
        state |= {"args": argparse.Namespace(**arguments), "checkpoint_version": 3.0, "iteration": 100}
    folder.mkdir(parents=True, exist_ok=True)
    dist_checkpointing.save(state, str(folder), ThreadSaveStrategy(), content_metadata=metadata)
