"""What a rank runs in the distributed tests: the real worker, and what it holds brought back in HF layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dapo_megatron.actor.replayed import Replay
from dapo_megatron.config.schema import Config
from dapo_megatron.types import MicroBatch, TrainBatch


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


def log_probs(rank: int, init_method: str, config: Config, batch: TrainBatch) -> list[tuple[np.ndarray, np.ndarray]] | None:
    """Of each micro-batch of the first optimizer step: which trained tokens this rank has, and their log-probs; None where it has none."""
    from dapo_megatron.actor.parallel import holds_loss
    from dapo_megatron.actor.step import compute_log_probs
    from dapo_megatron.actor.worker import ActorWorker

    worker = ActorWorker(config, rank=rank, init_method=init_method)
    tensors = worker.tensors(batch.optimizer_steps[0])
    values = compute_log_probs(worker.policy.chunks, tensors, worker.policy.head)
    if not holds_loss():
        return None
    return [(one.trained.numpy(), value.numpy()) for one, value in zip(tensors, values, strict=True)]


def load_and_compute_logits(
    rank: int, init_method: str, config: Config, samples: MicroBatch
) -> tuple[dict[str, np.ndarray] | None, np.ndarray | None]:
    """The HF tensors as they come back (rank 0), and the logits [tokens, vocabulary] of packed samples (where the last stage is)."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
    from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region

    from dapo_megatron.actor.live_weights import live_boxes, load_hf
    from dapo_megatron.actor.micro_batch import to_tensors
    from dapo_megatron.actor.parallel import context_share, initialize
    from dapo_megatron.actor.policy import build_modules
    from dapo_megatron.actor.weight_sender import WeightSender
    from dapo_megatron.models.architecture import Architecture
    from dapo_megatron.weights.plan import compile_mapping

    hf_config = json.loads((config.model.path / "config.json").read_text())
    device = initialize(config, rank=rank, init_method=init_method)
    modules, settings = build_modules(Architecture.from_hf(hf_config), config, device)
    mapping = compile_mapping(hf_config)
    load_hf(modules, mapping, config.model.path)
    sender = WeightSender(mapping, live_boxes(modules), bucket_bytes=20_000)
    tensors = received(mapping, list(sender.send(1)))

    multiple = settings.tensor_model_parallel_size if settings.sequence_parallel else 1
    batch = to_tensors(samples, device=device, implementation="local", pad_to_multiple=multiple, context=context_share())

    def forward(_: Any, model: Any) -> tuple:
        output = model(batch.input_ids, None, None, packed_seq_params=batch.packed)
        return output, lambda output, non_loss_data: output

    for module in modules:
        module.eval()
    with torch.no_grad():
        collected = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=[iter(()) for _ in modules] if len(modules) > 1 else iter(()),
            model=modules if len(modules) > 1 else modules[0],
            num_microbatches=1 if len(modules) == 1 else settings.pipeline_model_parallel_size,
            seq_length=1,
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
    if not parallel_state.is_pipeline_last_stage():
        return tensors, None
    logits = gather_from_tensor_model_parallel_region(collected[0])[0]
    return tensors, logits.index_select(0, batch.rows)[:, : mapping.hf_tensors["model.embed_tokens.weight"][0]].numpy()


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
