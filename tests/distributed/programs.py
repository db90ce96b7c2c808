"""What a rank runs in the distributed tests: the real worker, and what it holds brought back in HF layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from dapo_megatron.config.schema import Config
from dapo_megatron.types import TrainBatch


def make_config(model_dir: Path, dtype: str = "fp32", **actor: Any) -> Config:
    """A config with the given layout; sizes do not matter to the ranks."""
    return Config.model_validate(
        {
            "model": {"path": str(model_dir), "dtype": dtype, "transformer_impl": "local"},
            "data": {"path": "unused.jsonl"},
            "cluster": {"phase_deadline_seconds": 60},
            "actor": actor,
        }
    )


def round_trip(rank: int, init_method: str, config: Config, bucket_bytes: int) -> dict[str, np.ndarray] | None:
    """Load the HF directory into live ranks and send it back; the HF tensors on rank 0."""
    from dapo_megatron.actor.live_weights import live_boxes
    from dapo_megatron.actor.weight_sender import WeightSender
    from dapo_megatron.actor.worker import ActorWorker

    worker = ActorWorker(config, rank=rank, init_method=init_method)
    sender = WeightSender(worker.mapping, live_boxes(worker.policy.modules), bucket_bytes)
    return received(worker.mapping, list(sender.send(1)))


def first_step(rank: int, init_method: str, config: Config, batch: TrainBatch) -> dict[str, Any]:
    """Gradients (before clipping, HF layout) and statistics of the first optimizer step, log-probs before it, weights after."""
    from dapo_megatron.actor.live_weights import LiveBox, live_boxes
    from dapo_megatron.actor.parallel import holds_loss
    from dapo_megatron.actor.step import compute_log_probs, train_micro_batches
    from dapo_megatron.actor.weight_sender import WeightSender
    from dapo_megatron.actor.worker import ActorWorker

    worker = ActorWorker(config, rank=rank, init_method=init_method)
    policy = worker.policy
    micro_batches = worker.tensors(batch.optimizer_steps[0])
    log_probs = compute_log_probs(policy.chunks, micro_batches, policy.head)
    policy.zero_grad()
    statistics = train_micro_batches(policy.chunks, micro_batches, policy.head, config.algo, None)
    gradients = None
    if not config.actor.use_distributed_optimizer:  # with it, each data-parallel rank holds a part of the gradient
        for module in policy.modules:
            for parameter in module.parameters():
                parameter.data, parameter.backup = parameter.main_grad, parameter.data
        boxes: list[LiveBox] = live_boxes(policy.modules)
        gradients = received(worker.mapping, list(WeightSender(worker.mapping, boxes, 2**16).send(0)))
        for module in policy.modules:
            for parameter in module.parameters():
                parameter.data = parameter.backup
    _, grad_norm, _ = policy.optimizer.step()
    after = received(worker.mapping, list(WeightSender(worker.mapping, live_boxes(policy.modules), 2**16).send(1)))
    return {
        "log_probs": [values.numpy() for values in log_probs] if holds_loss() else None,
        "statistics": statistics,
        "gradients": gradients,
        "grad_norm": float(grad_norm),
        "weights_after": after,
    }


def received(mapping: Any, messages: list[Any]) -> dict[str, np.ndarray] | None:
    """Assemble what the sender yielded; None on ranks that yield nothing."""
    if not messages:
        return None
    from dapo_megatron.weights.receiver import BucketReceiver

    *buckets, manifest = messages
    tensors = {name: torch.full(shape, torch.nan) for name, shape in mapping.hf_tensors.items()}
    receiver = BucketReceiver(tensors, manifest.version)
    for bucket in buckets:
        receiver.receive(bucket)
    receiver.commit(manifest)
    return {name: tensor.numpy() for name, tensor in tensors.items()}
