"""The same objective with plain transformers, autograd and torch's AdamW: no packing, no parallelism, one sequence at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers

from dapo_megatron.config.schema import Config
from dapo_megatron.types import OptimizerStepBatch, TrainBatch, TrainSample


@dataclass(frozen=True, slots=True)
class OracleUpdate:
    """One optimizer step: mean loss over trained tokens, global gradient norm and gradients before clipping."""

    loss: float
    num_loss_tokens: int
    grad_norm: float
    gradients: dict[str, np.ndarray]
    num_clipped: int
    """Tokens whose gradient a clip stopped."""


@dataclass(frozen=True, slots=True)
class OracleRun:
    """A whole batch: its optimizer steps and the parameters after the last."""

    updates: list[OracleUpdate]
    weights: dict[str, np.ndarray]


def load(directory: Path) -> torch.nn.Module:
    """The transformers model in fp32."""
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What the files hold: parameters, and the router bias, which is a buffer."""
    buffers = {name: buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")}
    return dict(model.named_parameters()) | buffers


def per_expert(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors by the names of the files: transformers fuses the experts of a layer into two tensors in memory."""
    split = {}
    for name, tensor in tensors.items():
        prefix, _, fused = name.rpartition(".experts.")
        if not prefix:
            split[name] = tensor
            continue
        for expert, of_expert in enumerate(tensor):
            names = ("gate_proj", "up_proj") if fused == "gate_up_proj" else ("down_proj",)
            for part, rows in zip(names, of_expert.chunk(len(names)), strict=True):
                split[f"{prefix}.experts.{expert}.{part}.weight"] = rows
    return split


def sequence_logits(model: torch.nn.Module, sample: TrainSample) -> torch.Tensor:
    """Logits [response tokens, vocabulary] that predict the response of one sample, differentiable."""
    tokens = torch.tensor(sample.token_ids, dtype=torch.int64)
    return model(tokens[None]).logits[0, sample.num_prompt_tokens - 1 : -1]


def sequence_log_probs(model: torch.nn.Module, sample: TrainSample) -> torch.Tensor:
    """Log-probs of the response tokens of one sample, differentiable."""
    response = torch.tensor(sample.token_ids, dtype=torch.int64)[sample.num_prompt_tokens :]
    return torch.log_softmax(sequence_logits(model, sample), dim=-1).gather(1, response[:, None])[:, 0]


def train(directory: Path, config: Config, batch: TrainBatch) -> OracleRun:
    """Rollout step 0 with the config's loss and optimizer."""
    model = load(directory)
    settings = config.actor.optimizer
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
            {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=settings.lr / (settings.num_warmup_rollout_steps + 1),
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
    )
    with torch.no_grad():
        old = {id(sample): sequence_log_probs(model, sample) for step in batch.optimizer_steps for sample in _samples(step)}
    updates = []
    for step in batch.optimizer_steps:
        optimizer.zero_grad()
        loss, num_clipped = 0.0, 0
        for sample in _samples(step):
            log_probs = sequence_log_probs(model, sample)
            drawn_with = torch.tensor(sample.rollout_log_probs)
            weight = torch.ones_like(drawn_with)
            old_log_probs = old[id(sample)] if sample.on_policy else drawn_with
            if config.algo.tis_clip is not None:
                old_log_probs = old[id(sample)]
                weight = (old_log_probs - drawn_with).exp().clamp(max=config.algo.tis_clip)
            ratio = (log_probs - old_log_probs).exp()
            allowed = ratio.clamp(1 - config.algo.clip_ratio_low, 1 + config.algo.clip_ratio_high)
            objective = torch.minimum(ratio * sample.advantage, allowed * sample.advantage)
            sample_loss = -(weight * objective).sum() * sample.loss_weight / step.num_loss_tokens
            sample_loss.backward()
            loss += sample_loss.item()
            num_clipped += int((objective != ratio * sample.advantage).sum())
        gradients = per_expert({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
        norm = torch.nn.utils.clip_grad_norm_(parameters, settings.clip_grad or torch.inf)
        optimizer.step()
        in_numpy = {name: gradient.numpy() for name, gradient in gradients.items()}
        updates.append(OracleUpdate(loss, step.num_loss_tokens, float(norm), in_numpy, num_clipped))
    weights = per_expert({name: tensor.detach() for name, tensor in tensors(model).items()})
    return OracleRun(updates, {name: tensor.numpy() for name, tensor in weights.items()})


def _samples(step: OptimizerStepBatch) -> list[TrainSample]:
    return [sample for rank in step.micro_batches for micro_batch in rank for sample in micro_batch]
