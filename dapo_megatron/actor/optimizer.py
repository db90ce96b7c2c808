"""AdamW under megatron-core, with a learning rate that is a function of the rollout step alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer

from dapo_megatron.config.schema import ActorConfig, ModelConfig
from dapo_megatron.models.spec import DTYPES


def build_optimizer(chunks: Sequence[Any], actor: ActorConfig, model: ModelConfig) -> MegatronOptimizer:
    """AdamW over DDP-wrapped chunks; weight decay on matrices only, fp32 master weights under bf16."""
    settings = actor.optimizer
    return get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.beta1,
            adam_beta2=settings.beta2,
            adam_eps=settings.eps,
            clip_grad=settings.clip_grad,
            bf16=model.dtype == "bf16",
            params_dtype=DTYPES[model.dtype],
            use_distributed_optimizer=actor.use_distributed_optimizer,
        ),
        list(chunks),
    )


def learning_rate(actor: ActorConfig, rollout_step: int) -> float:
    """Linear warm-up over `num_warmup_rollout_steps`, then constant; `rollout_step` counts from 0."""
    warmup = actor.optimizer.num_warmup_rollout_steps
    return actor.optimizer.lr * min(1.0, (rollout_step + 1) / (warmup + 1))


def set_schedule(optimizer: MegatronOptimizer, actor: ActorConfig, rollout_step: int) -> None:
    """Set learning rate and weight decay of every parameter group.

    megatron-core marks norms and biases with a `wd_mult` of 0 and leaves it to the caller's scheduler to act on it.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(actor, rollout_step)
        group["weight_decay"] = actor.optimizer.weight_decay * group["wd_mult"]
