"""Legacy checkpoints as Megatron-LM writes them: one file for each rank, of models that megatron-core built."""

from __future__ import annotations

import argparse
import json
import random
import signal
from pathlib import Path
from typing import Any

from dapo_megatron.config.schema import Config
from tests.distributed.nominal_ranks import rank_of

ITERATION = 100


def save_legacy(rank: int, init_method: str, layouts: list[tuple[Config, Path]]) -> None:
    """Save the model of each config under its layout, rank after rank in this process.

    Names of files are Megatron-LM's own (`get_checkpoint_name`), and so is what is in them (`generate_state_dict`).
    """
    from megatron.core import parallel_state
    from megatron.training.checkpointing import generate_state_dict, get_checkpoint_name
    from torch import save

    from dapo_megatron.actor.live_weights import load_hf
    from dapo_megatron.weights.plan import compile_mapping

    for layout, folder in layouts:
        mapping = compile_mapping(json.loads((layout.model.path / "config.json").read_text()))
        for layout_rank in range(layout.actor.world_size):
            with rank_of(layout, layout_rank) as modules:
                is_saver = 0 in (parallel_state.get_data_parallel_rank(), parallel_state.get_expert_data_parallel_rank())
                if not is_saver:
                    continue
                load_hf(modules, mapping, layout.model.path)
                state = generate_state_dict(arguments_of(layout), modules, None, None, random_streams(), iteration=ITERATION)
                state["optimizer"] = {"param_groups": [{"lr": 1.0}], "state": {0: {"step": modules[0].vocab_size}}}
                file = Path(get_checkpoint_name(str(folder), ITERATION))
            file.parent.mkdir(parents=True)
            save(state, file)
        (folder / "latest_checkpointed_iteration.txt").write_text(str(ITERATION))


def arguments_of(layout: Config) -> argparse.Namespace:
    """Megatron-LM's arguments: the model, the layout, and values of the kinds that are found there."""
    import torch
    from megatron.core.transformer.enums import AttnBackend

    from dapo_megatron.weights.families import megatron_arguments

    actor = layout.actor
    model = megatron_arguments(json.loads((layout.model.path / "config.json").read_text()))
    size = actor.tensor_parallel_size
    return argparse.Namespace(
        **model,
        tensor_model_parallel_size=size,
        pipeline_model_parallel_size=actor.pipeline_parallel_size,
        virtual_pipeline_model_parallel_size=actor.virtual_pipeline_size,
        expert_model_parallel_size=actor.expert_parallel_size,
        expert_tensor_parallel_size=actor.expert_tensor_parallel_size,
        padded_vocab_size=-(-model["vocab_size"] // size) * size,
        make_vocab_size_divisible_by=1,
        transformer_impl="local",
        ckpt_format="torch",
        no_save_optim=False,
        no_save_rng=False,
        params_dtype=torch.float32,
        attention_backend=AttnBackend.auto,
        exit_signal=signal.SIGTERM,
        data_path=["a", "b"],
        lr=1e-4,
    )


def random_streams() -> list[dict[str, Any]]:
    """As Megatron-LM's `get_rng_state` gives them."""
    import numpy as np
    import torch

    return [
        {
            "random_rng_state": random.getstate(),
            "np_rng_state": np.random.get_state(),
            "torch_rng_state": torch.get_rng_state(),
            "cuda_rng_state": torch.get_rng_state(),
            "rng_tracker_states": {"model-parallel-rng": torch.get_rng_state()},
        }
    ]


def load_legacy(rank: int, init_method: str, layout: Config, checkpoint: Path) -> int:
    """Every rank loads its file with Megatron-LM's own loader, strictly, and must hold what it would hold of the HF directory.

    Returns how many parameters were compared.
    """
    import torch
    from megatron.core.safe_globals import register_safe_globals
    from megatron.training.checkpointing import _load_base_checkpoint, load_args_from_checkpoint

    from dapo_megatron.actor.live_weights import load_hf
    from dapo_megatron.weights.plan import compile_mapping

    register_safe_globals()
    mapping = compile_mapping(json.loads((layout.model.path / "config.json").read_text()))
    num_compared = 0
    for layout_rank in range(layout.actor.world_size):
        with rank_of(layout, layout_rank) as modules:
            arguments = argparse.Namespace(
                load=str(checkpoint),
                non_persistent_global_ckpt_dir=None,
                non_persistent_ckpt_type=None,
                exit_on_missing_checkpoint=True,
                use_tokenizer_model_from_checkpoint_args=False,
                use_mp_args_from_checkpoint_args=True,
                ckpt_format="torch",
            )
            arguments, _ = load_args_from_checkpoint(arguments)
            assert arguments.tensor_model_parallel_size == layout.actor.tensor_parallel_size
            assert arguments.virtual_pipeline_model_parallel_size == layout.actor.virtual_pipeline_size
            state, _, is_release, _ = _load_base_checkpoint(str(checkpoint), arguments)
            assert not is_release and state["iteration"] == ITERATION
            for index, module in enumerate(modules):
                module.load_state_dict(state[f"model{index}" if len(modules) > 1 else "model"], strict=True)
            found = [parameter.detach().clone() for module in modules for parameter in module.parameters()]
            load_hf(modules, mapping, layout.model.path)
            wanted = [parameter.detach() for module in modules for parameter in module.parameters()]
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
            num_compared += len(found)
    return num_compared
