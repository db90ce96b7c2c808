"""Process groups and random streams of an actor rank."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from dapo_megatron.config.schema import Config
from dapo_megatron.models.context_parallel import ContextShare
from dapo_megatron.types import ConfigError


def initialize(config: Config, *, rank: int, init_method: str) -> torch.device:
    """Join the actor's world (`init_method`, e.g. tcp://host:port) and build megatron-core's groups. Returns this rank's device."""
    actor = config.actor
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cpu" and actor.expert_parallel_size > 1 and actor.expert_tensor_parallel_size > 1:
        raise ConfigError(
            f"actor.expert_tensor_parallel_size ({actor.expert_tensor_parallel_size}) must be 1 with actor.expert_parallel_size "
            f"({actor.expert_parallel_size}) on CPU: gloo cannot gather shares of different length; set it to 1."
        )
    torch.set_num_threads(actor.num_threads)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=init_method,
        rank=rank,
        world_size=actor.world_size,
        timeout=timedelta(seconds=config.cluster.collective_timeout_seconds),
    )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=actor.tensor_parallel_size,
        pipeline_model_parallel_size=actor.pipeline_parallel_size,
        virtual_pipeline_model_parallel_size=actor.virtual_pipeline_size,
        context_parallel_size=actor.context_parallel_size,
        expert_model_parallel_size=actor.expert_parallel_size,
        expert_tensor_parallel_size=actor.expert_tensor_parallel_size,
    )
    model_parallel_cuda_manual_seed(config.run.seed)
    return device


def destroy() -> None:
    """Leave all groups."""
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def data_parallel_rank() -> int:
    """Which share of a batch this rank trains on; context-parallel ranks have one share together."""
    return parallel_state.get_data_parallel_rank()


def context_share() -> ContextShare:
    """Which part of each sequence of its share this rank has."""
    return ContextShare(parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size())


def holds_loss() -> bool:
    """True where log-probs and losses count: last pipeline stage, first tensor-parallel rank. Context-parallel ranks have different tokens."""
    return parallel_state.is_pipeline_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0
