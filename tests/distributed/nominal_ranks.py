"""megatron-core ranks of any layout, one after the other in one process, over process groups that exist in name only."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dapo_megatron.config.schema import Config


@contextmanager
def rank_of(layout: Config, rank: int) -> Iterator[list[Any]]:
    """The model chunks that megatron-core builds on that rank, parameters zero; `parallel_state` speaks of it meanwhile."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from dapo_megatron.actor.policy import build_modules
    from dapo_megatron.models.architecture import Architecture

    actor = layout.actor
    dist.init_process_group("fake", rank=rank, world_size=actor.world_size, store=FakeStore())
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=actor.tensor_parallel_size,
        pipeline_model_parallel_size=actor.pipeline_parallel_size,
        virtual_pipeline_model_parallel_size=actor.virtual_pipeline_size,
        expert_model_parallel_size=actor.expert_parallel_size,
        expert_tensor_parallel_size=actor.expert_tensor_parallel_size,
        create_gloo_process_groups=False,
    )
    model_parallel_cuda_manual_seed(0)
    try:
        hf_config = json.loads((layout.model.path / "config.json").read_text())
        yield build_modules(Architecture.from_hf(hf_config), layout, torch.device("cpu"))[0]
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
