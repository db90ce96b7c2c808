"""Trains on a batch and brings back, in HF layout, what no layout may change."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist

from dapo_megatron.actor.live_weights import LiveBox, gradient_boxes, live_boxes
from dapo_megatron.actor.policy import Policy
from dapo_megatron.actor.replayed import Replay, ReplayedUpdate
from dapo_megatron.actor.weight_sender import WeightSender
from dapo_megatron.actor.worker import ActorWorker
from dapo_megatron.types import TrainBatch
from dapo_megatron.weights.plan import ModelMapping
from dapo_megatron.weights.receiver import BucketReceiver
from dapo_megatron.weights.sync import WeightBucket

BUCKET_BYTES = 64 * 2**20


def replay(worker: ActorWorker, batch: TrainBatch, rollout_step: int) -> Replay | None:
    """Train on the batch; collective. The replay on rank 0, None elsewhere. The worker's weights are the updated ones afterwards."""
    policy, mapping = worker.policy, worker.mapping
    worker.memory.take_back()
    boxes = gradient_boxes(policy.modules)
    gradients: dict[str, np.ndarray] = {}

    def keep_gradients(index: int) -> None:
        if index == 0:
            _complete_gradients(policy)
            gradients.update(_in_hf_layout(mapping, boxes, compare_copies=False))  # those of copies need not be equal

    updates = worker.updates(batch, rollout_step, keep_gradients)
    weights = _in_hf_layout(mapping, live_boxes(policy.modules), compare_copies=True)
    if dist.get_rank():
        return None
    return Replay(
        tuple(
            ReplayedUpdate(
                update.statistics.loss_sum / update.statistics.num_loss_tokens,
                update.statistics.num_loss_tokens,
                update.grad_norm,
            )
            for update in updates
        ),
        gradients,
        weights,
    )


def _complete_gradients(policy: Policy) -> None:
    """Under the distributed optimizer a data-parallel rank has only its shard of each bucket summed: fetch the others."""
    for chunk in policy.chunks:
        if not chunk.ddp_config.use_distributed_optimizer:
            continue
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            group = buffer.data_parallel_group
            rank, size = dist.get_rank(group), dist.get_world_size(group)
            for bucket in buffer.buckets:
                own = bucket.grad_data.view(size, -1)[rank].clone()
                dist.all_gather_into_tensor(bucket.grad_data, own, group=group)


def _in_hf_layout(mapping: ModelMapping, boxes: Sequence[LiveBox], *, compare_copies: bool) -> dict[str, np.ndarray]:
    """fp32 tensors by HF name on rank 0, nothing elsewhere."""
    messages = WeightSender(mapping, boxes, BUCKET_BYTES, compare_copies=compare_copies).send(0)
    if dist.get_rank():
        for _ in messages:
            pass
        return {}
    tensors = {name: torch.empty(shape) for name, shape in mapping.hf_tensors.items()}
    receiver = BucketReceiver(tensors, 0)
    for message in messages:
        if isinstance(message, WeightBucket):
            receiver.receive(message)
        else:
            receiver.commit(message)
    return {name: tensor.numpy() for name, tensor in tensors.items()}
