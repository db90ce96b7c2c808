"""The trainable policy of one rank: model chunks under megatron-core's DDP, optimizer, LM head."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.transformer_config import TransformerConfig

from dapo_megatron.actor.optimizer import build_optimizer
from dapo_megatron.actor.step import LmHead
from dapo_megatron.config.schema import Config
from dapo_megatron.models.architecture import Architecture
from dapo_megatron.models.build import build_model
from dapo_megatron.models.spec import DTYPES, Implementation, choose_implementation, transformer_config


@dataclass(frozen=True, slots=True)
class Policy:
    """`modules` are the bare GPTModel chunks, `chunks` the same wrapped in DDP."""

    architecture: Architecture
    implementation: Implementation
    modules: list[GPTModel]
    chunks: list[Any]
    optimizer: MegatronOptimizer
    head: LmHead
    config: TransformerConfig

    @property
    def pack_multiple(self) -> int:
        """The tokens of a pack must be a multiple of this over all context-parallel ranks, to share them out evenly."""
        context = self.config.context_parallel_size
        sequence = self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1
        return sequence if context == 1 else context * math.lcm(2, sequence)

    def zero_grad(self) -> None:
        """Clear gradient buffers and the optimizer's gradients."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()


class GlooDdp(DistributedDataParallel):
    """megatron-core's DDP without the copies of whole buffers that torch makes for gloo's reduce-scatter and all-gather.

    Gradients are all-reduced in place. A rank that is alone in its group has nothing to gather. See UPSTREAM.md.
    """

    def finish_grad_sync(self, force_all_reduce: bool | None = False) -> None:
        super().finish_grad_sync(force_all_reduce=True)

    def _start_bucket_group_param_sync(self, bucket_group: Any, force_sync: bool = False) -> None:
        if bucket_group.intra_distributed_optimizer_instance_size > 1:
            super()._start_bucket_group_param_sync(bucket_group, force_sync=force_sync)


def build_modules(architecture: Architecture, config: Config, device: torch.device) -> tuple[list[GPTModel], TransformerConfig]:
    """Model chunks of this rank on its device, parameters zero until loaded."""
    settings = transformer_config(architecture, config.model, config.actor)
    modules = build_model(architecture, settings, choose_implementation(config.model))
    for module in modules:
        module.to(device=device, dtype=DTYPES[config.model.dtype])
        for name, buffer in module.named_buffers():
            if name.endswith(".router.expert_bias"):
                buffer.data = buffer.data.float()  # where routers keep it; 0.19.2 would restore it only after loading
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.zero_()
    return modules, settings


def wrap(modules: list[GPTModel], settings: TransformerConfig, architecture: Architecture, config: Config) -> Policy:
    """Put loaded modules under DDP and an optimizer. The optimizer copies fp32 master weights here, so load first."""
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=config.actor.use_distributed_optimizer
    )
    wrapper = DistributedDataParallel if torch.cuda.is_available() else GlooDdp
    chunks = [wrapper(settings, ddp, module, disable_bucketing=index > 0) for index, module in enumerate(modules)]
    optimizer = build_optimizer(chunks, config.actor, config.model)
    settings.finalize_model_grads_func = finalize_model_grads
    settings.grad_scale_func = optimizer.scale_loss
    head = LmHead(architecture.vocab_size, config.rollout.temperature, config.actor.log_prob_chunk_tokens)
    return Policy(architecture, choose_implementation(config.model), modules, chunks, optimizer, head, settings)
