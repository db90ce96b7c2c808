"""What the tensors of an actor rank really take: storages of parameters, gradients and optimizer state, and of what autograd saves."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dapo_megatron.config.schema import Config
from dapo_megatron.types import TrainBatch


@dataclass(frozen=True, slots=True)
class Measured:
    """Bytes of one rank; `stage` is its pipeline stage."""

    stage: int
    weight_bytes: int
    grad_bytes: int
    optimizer_bytes: int
    saved_bytes: int
    """The most that autograd held at any moment of a training step; indices and what every layer shares are left out."""


class _SavedTensors:
    """Hooks for torch.autograd.graph.saved_tensors_hooks that keep the books of live storages."""

    def __init__(self, ignored: Iterable[Tensor]):
        self._ignored = {tensor.untyped_storage().data_ptr() for tensor in ignored}
        self._holders: Counter[int] = Counter()
        self._live_bytes = self.peak_bytes = 0

    def pack(self, tensor: Tensor) -> _Holder:
        holder, storage = _Holder(tensor), tensor.untyped_storage()
        if tensor.is_floating_point() and storage.data_ptr() not in self._ignored:
            pointer, size = storage.data_ptr(), storage.nbytes()
            if not self._holders[pointer]:
                self._live_bytes += size
                self.peak_bytes = max(self.peak_bytes, self._live_bytes)
            self._holders[pointer] += 1
            weakref.finalize(holder, self._release, pointer, size)
        return holder

    def _release(self, pointer: int, size: int) -> None:
        self._holders[pointer] -= 1
        if not self._holders[pointer]:
            self._live_bytes -= size


class _Holder:
    def __init__(self, tensor: Tensor):
        self.tensor = tensor


def measure(rank: int, init_method: str, config: Config, batch: TrainBatch) -> Measured:
    """One optimizer step of the worker, measured."""
    from megatron.core import parallel_state

    from dapo_megatron.actor.parallel import data_parallel_rank
    from dapo_megatron.actor.step import train_micro_batches
    from dapo_megatron.actor.worker import ActorWorker

    worker = ActorWorker(config, rank=rank, init_method=init_method)
    policy = worker.policy
    micro_batches = worker.tensors(batch.share(data_parallel_rank()).optimizer_steps[0])
    parameters = [parameter for module in policy.modules for parameter in module.parameters()]
    train_micro_batches(policy.chunks, micro_batches, policy.head, config.algo, None)
    rotations = [tensor for batch in micro_batches for tensor in batch.packed.rotation or ()]
    shared = [*rotations, *(buffer for module in policy.modules for buffer in module.buffers())]
    saved = _SavedTensors([*parameters, *shared])
    policy.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda holder: holder.tensor):
        train_micro_batches(policy.chunks, micro_batches, policy.head, config.algo, None)
    policy.optimizer.step()
    buffers = [buffer for chunk in policy.chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    return Measured(
        stage=parallel_state.get_pipeline_model_parallel_rank(),
        weight_bytes=_storage_bytes(parameters),
        grad_bytes=_storage_bytes(buffer.grad_data for buffer in buffers),
        optimizer_bytes=sum(tensor.nbytes for tensor in _optimizer_tensors(policy.optimizer)),
        saved_bytes=saved.peak_bytes,
    )


def _optimizer_tensors(optimizer: Any) -> list[Tensor]:
    """Both moments, and master weights where parameters are not fp32."""
    found = []
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for state in part.optimizer.state.values():
            found += [state["exp_avg"], state["exp_avg_sq"]]
        groups = getattr(part, "shard_fp32_from_float16_groups", None) or getattr(part, "fp32_from_float16_groups", [])
        found += [master for group in groups for master in group if master is not None]
    return found


def _storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Of distinct storages."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
