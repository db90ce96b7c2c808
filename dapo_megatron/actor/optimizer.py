"""AdamW under megatron-core, with a learning rate that is a function of the rollout step alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
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


def set_learning_rate(optimizer: MegatronOptimizer, value: float) -> None:
    """Set lr of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = value


def torch_optimizers(optimizer: MegatronOptimizer) -> Iterator[torch.optim.Optimizer]:
    """The torch optimizers inside."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if part.optimizer is not None:
            yield part.optimizer


def allocate_state(optimizer: MegatronOptimizer) -> None:
    """Give torch's AdamW its state before the first step: megatron-core 0.19.2 reads `step` from it when saving or loading."""
    for inner in torch_optimizers(optimizer):
        for group in inner.param_groups:
            for parameter in group["params"]:
                if not inner.state[parameter]:
                    inner.state[parameter] = {
                        "step": torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }


def unshare_step(optimizer: MegatronOptimizer) -> None:
    """After loading, megatron-core 0.19.2 gives all parameters one `step` tensor, which AdamW would advance once per parameter."""
    for inner in torch_optimizers(optimizer):
        for state in inner.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()
