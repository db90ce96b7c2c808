"""Times optimizer steps of a layout on its real ranks."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from dapo_megatron.actor.probed import Probed, ProbedStep
from dapo_megatron.actor.step import compute_log_probs
from dapo_megatron.actor.worker import ActorWorker
from dapo_megatron.types import TrainBatch


def probe(worker: ActorWorker, batch: TrainBatch, rollout_step: int) -> Probed:
    """Take the optimizer steps of the batch, each timed on its own; collective. The first warms up and is not in the result."""
    policy, gpu = worker.policy, torch.cuda.is_available()
    steps = []
    for step in batch.optimizer_steps:
        micro_batches = worker.tensors(step)
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        start = _now()
        compute_log_probs(policy.chunks, micro_batches, policy.head)
        computed = _now()
        worker.updates(TrainBatch((step,)), rollout_step)
        steps.append(ProbedStep(len(micro_batches), _now() - computed, computed - start))
    return Probed(tuple(steps[1:]), torch.cuda.max_memory_allocated() if gpu else None)


def _now() -> float:
    """Once every rank is here and its device idle."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    dist.barrier()
    return time.perf_counter()
