"""A canary: numbers of a fixed batch that a checkpoint carries, and that must come out again when it is loaded.

Weights that were loaded wrong change the log-probs; an optimizer that was loaded wrong changes its sums.
"""

from __future__ import annotations

import math
import platform
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from pydantic import TypeAdapter

from dapo_megatron.actor.micro_batch import to_tensors
from dapo_megatron.actor.optimizer_state import parts_of
from dapo_megatron.actor.parallel import context_share
from dapo_megatron.actor.policy import Policy
from dapo_megatron.actor.step import compute_log_probs, evaluate_loss
from dapo_megatron.config.schema import Config
from dapo_megatron.types import TrainSample

NUM_PROMPT_TOKENS, NUM_RESPONSE_TOKENS, NUM_SAMPLES = 4, 12, 2
TOLERANCE = {"fp32": 1e-3, "bf16": 0.1}
"""Largest difference of a log-prob (nats) or of the mean loss under another layout or on other hardware."""


@dataclass(frozen=True, slots=True)
class Canary:
    """`layout` says what rounding depends on: where it is the same, the numbers must be the same bit for bit."""

    layout: dict[str, str]
    log_probs: tuple[float, ...]
    loss: float
    optimizer: dict[str, float]
    """Sums over the optimizer's tensors on all ranks; comparable under the same layout only."""


CANARY = TypeAdapter(Canary)


def measure(policy: Policy, config: Config, device: torch.device) -> Canary:
    """The canary of the policy as it stands; collective, the same on every rank. Changes nothing, draws no random numbers."""
    batch = to_tensors(
        tuple(_sample(index, policy.architecture.vocab_size) for index in range(NUM_SAMPLES)),
        device=device,
        implementation=policy.implementation,
        pad_to_multiple=policy.pack_multiple,
        context=context_share(),
    )
    # Interleaved schedules want a multiple of the pipeline size; equal micro-batches have equal means.
    batches = [batch] * (parallel_state.get_pipeline_model_parallel_world_size() if config.actor.virtual_pipeline_size else 1)
    for chunk in policy.chunks:
        chunk.eval()
    log_probs = compute_log_probs(policy.chunks, batches, policy.head)
    loss = evaluate_loss(policy.chunks, batches, policy.head, config.algo)
    for chunk in policy.chunks:
        chunk.train()
    held: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(held, list(zip(batch.trained.tolist(), log_probs[0].tolist(), strict=True)) if log_probs else [])
    # Of a token's copies the first rank's; context-parallel ranks have different tokens.
    by_token = {token: value for of_rank in reversed(held) for token, value in of_rank}
    in_order = tuple(by_token[token] for token in range(NUM_SAMPLES * NUM_RESPONSE_TOKENS))
    return Canary(_layout(config, device), in_order, loss, _optimizer_sums(policy, device))


def first_difference(saved: Canary, now: Canary) -> str | None:
    """The first number that is not what it was, in words; None when all are."""
    exact = saved.layout == now.layout
    tolerance = 0.0 if exact else TOLERANCE[now.layout["model.dtype"]]
    under = "the same layout" if exact else f"another layout (tolerance {tolerance:g})"
    pairs = [(f"log-prob {index}", *pair) for index, pair in enumerate(zip(saved.log_probs, now.log_probs, strict=True))]
    pairs.append(("loss", saved.loss, now.loss))
    if exact:
        pairs += [(f"optimizer {name}", value, now.optimizer.get(name, math.nan)) for name, value in saved.optimizer.items()]
    for name, before, after in pairs:
        if not abs(before - after) <= tolerance:
            return f"{name} of the canary is {after!r} under {under}, but was {before!r} when it was saved"
    return None


def _sample(index: int, vocab_size: int) -> TrainSample:
    length = NUM_PROMPT_TOKENS + NUM_RESPONSE_TOKENS
    return TrainSample(
        token_ids=(7 * np.arange(length, dtype=np.int32) + 13 * index + 3) % vocab_size,
        num_prompt_tokens=NUM_PROMPT_TOKENS,
        rollout_log_probs=np.full(NUM_RESPONSE_TOKENS, -2.0, dtype=np.float32),
        advantage=1.0 if index % 2 else -0.5,
        loss_weight=1.0,
        on_policy=False,
    )


def _optimizer_sums(policy: Policy, device: torch.device) -> dict[str, float]:
    """Sum of |x| over master weights and each kind of state."""
    zero = torch.zeros((), dtype=torch.float64, device=device)
    sums: dict[str, torch.Tensor] = {}
    for optimizer in parts_of(policy.optimizer):
        for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
            tensors = {"master_weights": parameter, **optimizer.optimizer.state[parameter]}
            for name, value in tensors.items():
                if isinstance(value, torch.Tensor):
                    sums[name] = sums.get(name, zero) + value.detach().double().abs().sum().to(device)
    names: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(names, sorted(sums))
    everywhere = sorted({name for some in names for name in some})
    totals = torch.stack([sums.get(name, zero) for name in everywhere])
    dist.all_reduce(totals)
    return dict(zip(everywhere, totals.tolist(), strict=True))


def _layout(config: Config, device: torch.device) -> dict[str, str]:
    actor = config.actor.model_dump(mode="json", exclude={"optimizer", "offload"})
    hardware = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    )
    return {
        **{f"actor.{name}": str(value) for name, value in actor.items()},
        "model.dtype": config.model.dtype,
        "model.transformer_impl": config.model.transformer_impl,
        "rollout.temperature": str(config.rollout.temperature),
        "hardware": hardware,
        "torch": torch.__version__,
    }
