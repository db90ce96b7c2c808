"""What a rank runs in the distributed tests: the real worker, and what it holds brought back in HF layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from dapo_megatron.actor.replayed import Replay
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


def load_and_replay(
    rank: int, init_method: str, config: Config, batch: TrainBatch
) -> tuple[dict[str, np.ndarray] | None, Replay | None]:
    """On rank 0: the HF tensors as they come back from the ranks that loaded them, and what training on the batch gives."""
    from dapo_megatron.actor.live_weights import live_boxes
    from dapo_megatron.actor.parallel import data_parallel_rank
    from dapo_megatron.actor.replay import replay
    from dapo_megatron.actor.weight_sender import WeightSender
    from dapo_megatron.actor.worker import ActorWorker

    worker = ActorWorker(config, rank=rank, init_method=init_method)
    sender = WeightSender(worker.mapping, live_boxes(worker.policy.modules), bucket_bytes=5000)
    share = batch.share(data_parallel_rank())
    return received(worker.mapping, list(sender.send(1))), replay(worker, share, rollout_step=0)


def log_probs(rank: int, init_method: str, config: Config, batch: TrainBatch) -> list[np.ndarray] | None:
    """Log-probs of each micro-batch of the first optimizer step, on one rank per data-parallel copy."""
    from dapo_megatron.actor.parallel import holds_loss
    from dapo_megatron.actor.step import compute_log_probs
    from dapo_megatron.actor.worker import ActorWorker

    worker = ActorWorker(config, rank=rank, init_method=init_method)
    values = compute_log_probs(worker.policy.chunks, worker.tensors(batch.optimizer_steps[0]), worker.policy.head)
    return [value.numpy() for value in values] if holds_loss() else None


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
