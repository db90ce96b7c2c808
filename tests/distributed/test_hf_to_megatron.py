"""A converted checkpoint on real ranks: Megatron-LM's own loader, unmodified, under layouts that the converter knows nothing of."""

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


def load_with_megatron_lm(rank: int, init_method: str, config: Config, checkpoint: Path) -> dict[str, np.ndarray] | None:
    """On the rank that sends: the HF tensors as the ranks hold them after loading over parameters that were set to a constant."""
    import torch
    from megatron.core import parallel_state
    from megatron.training.checkpointing import _load_base_checkpoint, load_args_from_checkpoint

    from dapo_megatron.actor.worker import ActorWorker

    worker = ActorWorker(config, rank=rank, init_method=init_method)
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
    assert arguments.num_layers == worker.policy.modules[0].config.num_layers
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    modules = worker.policy.modules
    with torch.no_grad():
        for parameter in (parameter for module in modules for parameter in module.parameters()):
            parameter.fill_(7)
    wanted: dict[str, Any] = {f"model{i}": module.sharded_state_dict(metadata=metadata) for i, module in enumerate(modules)}
    state, _, is_release, _ = _load_base_checkpoint(str(checkpoint), arguments, sharded_state_dict=wanted)
    assert is_release
    for index, module in enumerate(modules):
        module.load_state_dict(state[f"model{index}"])
    return programs.received(worker.mapping, list(worker.send_weights(1)))


@pytest.fixture(scope="module", params=["llama3_tied", "qwen2"])
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    source = make_hf_model(folder / "hf", request.param)
    convert(source, folder / "megatron")
    return source, folder / "megatron"


@pytest.mark.parametrize(
    "layout",
    [
        {"tensor_parallel_size": 2},
        {"pipeline_parallel_size": 2, "virtual_pipeline_size": 2},
        {"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
    ],
    ids=["tp2", "pp2_vpp2", "tp2_pp2"],
)
def test_megatron_lm_loads_the_converted_weights_bit_by_bit(converted: tuple[Path, Path], layout: dict[str, int]):
    source, checkpoint = converted
    config = programs.make_config(source, **layout)
    (loaded,) = (got for got in run_ranks(load_with_megatron_lm, config.actor.world_size, config, checkpoint) if got is not None)
    expected = load_file(source / "model.safetensors")
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert np.array_equal(loaded[name], tensor), name
