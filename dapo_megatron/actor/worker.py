"""One actor rank as an object: what the launcher calls on every rank at the same time.

Importing this module imports megatron-core; call `cpu_adapter.install()` first.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dapo_megatron.actor import canary, checkpoint, parallel
from dapo_megatron.actor.checkpoint import BackgroundSave
from dapo_megatron.actor.live_weights import live_boxes, load_hf
from dapo_megatron.actor.micro_batch import MicroBatchTensors, to_tensors
from dapo_megatron.actor.offload import ActorMemory, OffloadedMemory
from dapo_megatron.actor.optimizer import learning_rate, set_schedule
from dapo_megatron.actor.policy import Policy, build_modules, wrap
from dapo_megatron.actor.step import LossStatistics, compute_log_probs, train_micro_batches
from dapo_megatron.actor.weight_pusher import WeightPusher, configured_pusher, transports
from dapo_megatron.actor.weight_sender import WeightSender, configured_sender
from dapo_megatron.config.schema import Config
from dapo_megatron.models.architecture import Architecture
from dapo_megatron.types import CheckpointError, EngineEndpoint, NumericsError, OptimizerStepBatch, TrainBatch
from dapo_megatron.weights.file_digest import FileDigest
from dapo_megatron.weights.plan import compile_mapping
from dapo_megatron.weights.sync import WeightBucket, WeightManifest
from dapo_megatron.weights.transports.records import PushReport

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Update:
    """One optimizer step, the same on all ranks: what the loss reported, and the global gradient norm before clipping."""

    statistics: LossStatistics
    grad_norm: float


class ActorWorker:
    """The policy's part on this rank. All methods are collective: call them on every rank, in the same order."""

    def __init__(self, config: Config, *, rank: int, init_method: str):
        """Join the world and load the HF directory into this rank's parameters."""
        self._config = config
        hf_config = json.loads((config.model.path / "config.json").read_text())
        architecture, self.mapping = Architecture.from_hf(hf_config), compile_mapping(hf_config)
        self._device = parallel.initialize(config, rank=rank, init_method=init_method)
        modules, settings = build_modules(architecture, config, self._device)
        load_hf(modules, self.mapping, config.model.path)
        self.policy: Policy = wrap(modules, settings, architecture, config)
        self._sender: WeightSender | None = None
        self._pusher: WeightPusher | None = None
        self.memory = OffloadedMemory(self.policy, self._device) if config.actor.offload else ActorMemory()

    def train(self, batch: TrainBatch, rollout_step: int) -> dict[str, float]:
        """Old log-probs, then one optimizer step per entry of the batch. Returns the actor's metrics, equal on all ranks.

        Of the batch only the micro-batches of this rank's data-parallel rank are looked at (`TrainBatch.share`).
        Raises NumericsError when a gradient norm is not finite; the weights are spoiled then.
        """
        updates = self.updates(batch, rollout_step)
        statistics = [update.statistics for update in updates]
        # With the engine's log-probs as old ones, only the first step still has the weights that sampled.
        compared = statistics if self._config.algo.old_log_probs == "actor" else statistics[:1]
        row = _metrics(updates, learning_rate(self._config.actor, rollout_step)) | _log_prob_differences(compared)
        return row | _mismatch(compared, truncates=self._config.algo.tis_clip is not None)

    def updates(
        self, batch: TrainBatch, rollout_step: int, before_step: Callable[[int], None] = lambda index: None
    ) -> list[Update]:
        """As `train`, one record per optimizer step; `before_step` is called with its index when its gradients are complete."""
        self.memory.take_back()
        set_schedule(self.policy.optimizer, self._config.actor, rollout_step)
        steps = [self.tensors(step) for step in batch.optimizer_steps]
        old_log_probs = self._old_log_probs(steps)
        updates = []
        for index, micro_batches in enumerate(steps):
            self.policy.zero_grad()
            statistics = train_micro_batches(
                self.policy.chunks, micro_batches, self.policy.head, self._config.algo, old_log_probs[index]
            )
            before_step(index)
            _, grad_norm, _ = self.policy.optimizer.step()
            if not math.isfinite(grad_norm):
                raise NumericsError(
                    f"actor/grad_norm is {grad_norm} in optimizer step {index} of rollout step {rollout_step}; the run goes on from its "
                    "newest checkpoint, lower actor.optimizer.lr if it happens again"
                )
            updates.append(Update(statistics, float(grad_norm)))
        return updates

    def send_weights(self, version: int) -> Iterator[WeightBucket | WeightManifest]:
        """The policy in HF layout: buckets, then the manifest with fingerprints. Yields on rank 0 only."""
        with self.memory.sending():
            if self._sender is None:
                self._sender = configured_sender(self._config, self.mapping, self.policy.modules)
            yield from self._sender.send(version)

    def push_weights(
        self, version: int, endpoints: Sequence[EngineEndpoint], node: str, gpu_id: int | None = None
    ) -> PushReport | None:
        """Bring the policy to rollout servers, see `WeightPusher.push`; the report on rank 0, which is on GPU `gpu_id` of `node`."""
        with self.memory.sending():
            if self._pusher is None:
                self._pusher = configured_pusher(self._config, self.mapping, live_boxes(self.policy.modules))
            return self._pusher.push(version, transports(self._config, endpoints, node), gpu_id)

    def make_room(self) -> dict[str, float]:
        """Leave the device to the engines, but for the parameters, which go after the next send; metrics of this rank's moves."""
        return self.memory.make_room()

    def start_save(self, directory: Path) -> None:
        """Copy weights, optimizer and random streams to host memory and begin to write them; `finish_save` must follow."""
        self.memory.take_back()
        self._save = BackgroundSave(self.policy, directory, canary.measure(self.policy, self._config, self._device))

    def save_is_written(self) -> bool:
        """Whether this rank's files are done; not collective."""
        return self._save.is_written()

    def finish_save(self) -> dict[str, FileDigest]:
        """Wait for the files and complete them; the digests of this rank's files by relative name."""
        return self._save.finish()

    def load(self, directory: Path, digests: Mapping[str, FileDigest], allow_canary: bool = False) -> None:
        """Read what was saved, under this layout or another, and prove it.

        Raises CheckpointError when a file is not the one of its digest, or when the canary gives other numbers than it gave when
        it was saved (with `allow_canary` that is a warning).
        """
        checkpoint.check_files(directory, digests)
        self.memory.take_back()
        checkpoint.load(self.policy, directory)
        now = canary.measure(self.policy, self._config, self._device)
        difference = canary.first_difference(checkpoint.load_canary(directory), now)
        if difference and not allow_canary:
            raise CheckpointError(
                f"{directory} was not loaded as it was saved: {difference}; --allow-changed canary goes on all the same"
            )
        if difference:
            logger.warning("%s: %s", directory, difference)

    def close(self) -> None:
        """Leave the process groups."""
        parallel.destroy()

    def tensors(self, step: OptimizerStepBatch) -> list[MicroBatchTensors]:
        return [
            to_tensors(
                samples,
                device=self._device,
                implementation=self.policy.implementation,
                pad_to_multiple=self.policy.pack_multiple,
                context=parallel.context_share(),
            )
            for samples in step.micro_batches[parallel.data_parallel_rank()]
        ]

    def _old_log_probs(self, steps: Sequence[Sequence[MicroBatchTensors]]) -> list[list[torch.Tensor] | None]:
        """Per optimizer step. None where the training forward pass itself gives them: the first step has the weights that sampled."""
        if self._config.algo.old_log_probs == "engine":
            return [None for _ in steps]
        later = [compute_log_probs(self.policy.chunks, step, self.policy.head) for step in steps[1:]]
        return [None, *later]


def _metrics(updates: Sequence[Update], lr: float) -> dict[str, float]:
    """Means are over the trained tokens of all optimizer steps, except loss and grad_norm: over optimizer steps."""
    statistics = [update.statistics for update in updates]
    tokens = sum(step.num_loss_tokens for step in statistics)
    return {
        "actor/loss": sum(step.loss_sum / step.num_loss_tokens for step in statistics) / len(statistics),
        "actor/grad_norm": sum(update.grad_norm for update in updates) / len(updates),
        "actor/entropy_nats": sum(step.entropy_sum for step in statistics) / tokens,
        "actor/mean_probability": sum(step.probability_sum for step in statistics) / tokens,
        "actor/clip_fraction_low": sum(step.num_clipped_low for step in statistics) / tokens,
        "actor/clip_fraction_high": sum(step.num_clipped_high for step in statistics) / tokens,
        "actor/ratio_max": max(step.ratio_max for step in statistics),
        "actor/learning_rate": lr,
        "actor/num_optimizer_steps": len(statistics),
        "actor/num_loss_tokens": tokens,
    }


def _log_prob_differences(statistics: Sequence[LossStatistics]) -> dict[str, float]:
    """|actor - engine| over on-policy tokens; not measured when there is none."""
    tokens = sum(step.num_on_policy_tokens for step in statistics)
    if not tokens:
        return {}
    return {
        "actor/log_prob_diff_mean": sum(step.log_prob_diff_sum for step in statistics) / tokens,
        "actor/log_prob_diff_max": max(step.log_prob_diff_max for step in statistics),
    }


def _mismatch(statistics: Sequence[LossStatistics], *, truncates: bool) -> dict[str, float]:
    """|actor - engine| over all tokens; not measured where every token is on-policy and nothing is corrected."""
    tokens = sum(step.num_loss_tokens for step in statistics)
    if not truncates and tokens == sum(step.num_on_policy_tokens for step in statistics):
        return {}
    row = {
        "actor/mismatch_mean": sum(step.mismatch_sum for step in statistics) / tokens,
        "actor/mismatch_max": max(step.mismatch_max for step in statistics),
        "actor/mismatch_kl_nats": sum(step.mismatch_k3_sum for step in statistics) / tokens,
    }
    return row | ({"actor/tis_clip_fraction": sum(step.num_truncated for step in statistics) / tokens} if truncates else {})
