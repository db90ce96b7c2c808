"""A converted checkpoint on real ranks: megatron-core's and Megatron-LM's own loaders under layouts that the converter knows nothing of."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from checkpoint_tools.hf_to_megatron import Options, run
from dapo_megatron.config.schema import Config
from tests.distributed import programs
from tests.distributed.ranks import run_ranks
from tests.tiny_models import make_hf_model


def convert(source: Path, target: Path) -> None:
    run(Options(source, target, "keep", num_workers=1, max_memory=2**26, dry_run=False, force=False, as_json=False))


def load_converted(rank: int, init_method: str, config: Config, checkpoint: Path, loader: str) -> dict[str, np.ndarray] | None:
    """On the rank that sends: the HF tensors as the ranks hold them after loading over parameters that were set to a constant."""
    import torch
    from megatron.core import dist_checkpointing, parallel_state

    from dapo_megatron.actor.worker import ActorWorker

    worker = ActorWorker(config, rank=rank, init_method=init_method)
    modules = worker.policy.modules
    with torch.no_grad():
        for parameter in (parameter for module in modules for parameter in module.parameters()):
            parameter.fill_(7)
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    wanted: dict[str, Any] = {f"model{i}": module.sharded_state_dict(metadata=metadata) for i, module in enumerate(modules)}
    if loader == "megatron-core":
        state = dist_checkpointing.load(wanted, str(checkpoint / "release"))
    else:
        state = megatron_lm_load(checkpoint, wanted, modules[0].config.num_layers)
    for index, module in enumerate(modules):
        module.load_state_dict(state[f"model{index}"])
    return programs.received(worker.mapping, list(worker.send_weights(1)))


def megatron_lm_load(checkpoint: Path, wanted: dict[str, Any], num_layers: int) -> dict[str, Any]:
    """The load of Megatron-LM's training loop: tracker file, arguments of the checkpoint, then the tensors."""
    from megatron.training.checkpointing import _load_base_checkpoint, load_args_from_checkpoint

    arguments = argparse.Namespace(
        load=str(checkpoint),
        non_persistent_global_ckpt_dir=None,
        non_persistent_ckpt_type=None,
        exit_on_missing_checkpoint=True,
        use_tokenizer_model_from_checkpoint_args=False,
        use_mp_args_from_checkpoint_args=False,
        ckpt_assume_constant_structure=False,
        stream_ckpt_dequant=True,
        ckpt_fully_parallel_load=False,
        ckpt_load_validate_sharding_integrity=True,
        dist_ckpt_strictness="assume_ok_unexpected",
        verify_integrity=False,
    )
    arguments, _ = load_args_from_checkpoint(arguments)
    assert arguments.num_layers == num_layers
    state, _, is_release, _ = _load_base_checkpoint(str(checkpoint), arguments, sharded_state_dict=wanted)
    assert is_release
    return state


TP2_SP = {"tensor_parallel_size": 2, "sequence_parallel": True}
PP2, VPP2 = {"pipeline_parallel_size": 2}, {"virtual_pipeline_size": 2}
EP2, ETP2 = {"expert_parallel_size": 2}, {"expert_tensor_parallel_size": 2}
CASES = [
    ("llama3_tied", {"tensor_parallel_size": 2} | PP2, "Megatron-LM"),
    ("qwen2", TP2_SP, "megatron-core"),
    ("qwen3", PP2 | VPP2, "megatron-core"),
    ("qwen3_moe", {"num_ranks": 4} | TP2_SP | EP2, "megatron-core"),
    ("qwen3_moe_some_dense", PP2, "megatron-core"),
    ("mixtral", TP2_SP | ETP2, "megatron-core"),
    ("deepseek_v2", {"num_ranks": 4} | PP2 | EP2, "megatron-core"),
    ("deepseek_v3", TP2_SP | EP2, "Megatron-LM"),
    ("moonlight", {"num_ranks": 2} | EP2, "megatron-core"),
]
"""Every family: with layers stacked under one key, or apart where MoE layers are picked by a list; a vocabulary that needs padding."""


@pytest.mark.parametrize(("family", "layout", "loader"), CASES, ids=[f"{family}-{loader}" for family, _, loader in CASES])
def test_a_converted_checkpoint_loads_bit_by_bit(tmp_path: Path, family: str, layout: dict[str, Any], loader: str):
    source, checkpoint = make_hf_model(tmp_path / "hf", family), tmp_path / "megatron"
    convert(source, checkpoint)
    config = programs.make_config(source, **layout)
    loaded = run_ranks(load_converted, config.actor.world_size, config, checkpoint, loader)[0]
    expected = load_file(source / "model.safetensors")
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert np.array_equal(loaded[name], tensor), name
