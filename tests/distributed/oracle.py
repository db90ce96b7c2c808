"""The same objective with plain transformers and autograd: no packing, no parallelism, one sequence at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import transformers

from dapo_megatron.types import TrainBatch, TrainSample


def sequence_log_probs(model: torch.nn.Module, sample: TrainSample) -> torch.Tensor:
    """Log-probs of the response tokens of one sample, differentiable."""
    tokens = torch.tensor(sample.token_ids, dtype=torch.int64)
    logits = model(tokens[None]).logits[0, :-1]
    picked = torch.log_softmax(logits, dim=-1).gather(1, tokens[1:, None])[:, 0]
    return picked[sample.num_prompt_tokens - 1 :]


def load(directory: Path) -> torch.nn.Module:
    """The transformers model in fp32."""
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def first_step_gradients(model: torch.nn.Module, batch: TrainBatch) -> tuple[float, dict[str, np.ndarray]]:
    """Loss (mean over trained tokens) and gradients of the first optimizer step, at ratio 1."""
    step = batch.optimizer_steps[0]
    total = 0.0
    for rank in step.micro_batches:
        for micro_batch in rank:
            for sample in micro_batch:
                log_probs = sequence_log_probs(model, sample)
                ratio = (log_probs - log_probs.detach()).exp()
                loss = -(ratio * sample.advantage).sum() * sample.loss_weight / step.num_loss_tokens
                loss.backward()
                total += loss.item()
    return total, {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
