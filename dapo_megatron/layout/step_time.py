"""Time of a rollout step, by item: generation, old log-probs, optimizer steps, weight sync, swaps to host memory."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from dapo_megatron.layout.calibration import Calibration
from dapo_megatron.layout.flops import training_flops
from dapo_megatron.layout.layer_time import Machine
from dapo_megatron.layout.layout import Layout
from dapo_megatron.layout.model_shape import ModelShape
from dapo_megatron.layout.parameters import num_params
from dapo_megatron.layout.rollout_time import rollout_seconds
from dapo_megatron.layout.train_time import MicroBatches, UpdateSeconds, micro_batches, update_seconds
from dapo_megatron.layout.workload import Workload

Phase = Literal["rollout", "log_probs", "train", "sync"]
PHASES: tuple[Phase, ...] = ("rollout", "log_probs", "train", "sync")

SYNC_SECONDS = 1.0
"""Pausing engines, fingerprints and their answers, of one weight sync."""
SWAPPED_OPTIMIZER_BYTES = 12
"""fp32 master weight and two moments of a parameter."""


@dataclass(frozen=True, slots=True)
class TimeItem:
    """Seconds of a step that one thing takes; what runs beside something else counts only where it is waited for."""

    phase: Phase
    name: str
    seconds: float


@dataclass(frozen=True, slots=True)
class StepTime:
    """One rollout step. The seconds of `items` add up to it."""

    items: tuple[TimeItem, ...]
    num_gpus: int
    """Of actor and engines."""
    num_actor_gpus: int
    num_trained_tokens: float
    """Prompt and response tokens of the sequences trained on."""
    num_generated_tokens: float
    """Response tokens, of dropped groups too."""
    train_flops: float
    """Forward and backward of the trained tokens, without recompute, over all devices."""
    peak_flops_per_second: float
    """Of one device."""
    decode_bound: str | None
    """What a full decoding step waits for; None without engines."""
    step_seconds: float = field(init=False, compare=False)
    """The whole step."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "step_seconds", sum([item.seconds for item in self.items]))

    def phase_seconds(self, phase: Phase) -> float:
        """The items of one phase together."""
        return sum([item.seconds for item in self.items if item.phase == phase])

    @property
    def tokens_per_gpu_second(self) -> float:
        """Trained tokens per device and second of the whole step."""
        return self.num_trained_tokens / self.num_gpus / self.step_seconds

    @property
    def mfu(self) -> float:
        """Training FLOPs over what the actor's devices could do during the train phase, in [0, 1]."""
        return self.train_flops / (self.peak_flops_per_second * self.num_actor_gpus * self.phase_seconds("train"))

    def gpu_hours(self, num_rollout_steps: int) -> float:
        """Device hours of a run."""
        return self.step_seconds * num_rollout_steps * self.num_gpus / 3600


def step_time(
    machine: Machine,
    shape: ModelShape,
    layout: Layout,
    workload: Workload,
    kv_cache_tokens: int | None,
    calibration: Calibration | None = None,
) -> StepTime:
    """One rollout step. `kv_cache_tokens` fit into the cache of one engine (`MemoryPlan`); None and no engine: training only."""
    batches = micro_batches(workload, layout)
    update = update_seconds(machine, shape, layout, batches)
    items = [*_log_prob_items(update, workload, batches), *_train_items(update, workload)]
    bound = None
    if layout.engine is not None:
        if kv_cache_tokens is None:
            raise ValueError("kv_cache_tokens is None; give what the KV cache of the layout's engines holds")
        rollout = rollout_seconds(machine, shape, layout.engine, workload, kv_cache_tokens)
        bound = rollout.bound
        generation = [
            TimeItem("rollout", "prefill", rollout.prefill),
            TimeItem("rollout", "decode", rollout.decode),
            TimeItem("rollout", "decode: tail of long responses", rollout.tail),
        ]
        items = [*generation, *items, *_sync_items(machine, shape, layout, update.owned_parameters, update.held_parameters)]
    if calibration is not None:
        items = [replace(item, seconds=item.seconds * calibration.factor(item.phase)) for item in items]
    if workload.rollout_lag:
        items = _beside_training(items)
    num_tokens = workload.num_samples_per_step * workload.sequence_tokens
    separate = layout.engine.num_gpus if layout.engine is not None and not layout.engine.colocated else 0
    return StepTime(
        items=tuple(items),
        num_gpus=layout.world_size + separate,
        num_actor_gpus=layout.world_size,
        num_trained_tokens=num_tokens,
        num_generated_tokens=workload.num_samples_per_step * workload.over_sampling * workload.response_tokens,
        train_flops=training_flops(shape, num_tokens, num_tokens * workload.mean_square),
        peak_flops_per_second=machine.gpu.bf16_tflops * 1e12,
        decode_bound=bound,
    )


def _beside_training(items: list[TimeItem]) -> list[TimeItem]:
    """With a lag of one step only the part of generation counts that lasts longer than training."""
    generation = sum(item.seconds for item in items if item.phase == "rollout")
    training = sum(item.seconds for item in items if item.phase in ("log_probs", "train"))
    waited = max(0.0, generation - training) / generation if generation else 0.0
    return [replace(item, seconds=item.seconds * waited) if item.phase == "rollout" else item for item in items]


def _log_prob_items(update: UpdateSeconds, workload: Workload, batches: MicroBatches) -> list[TimeItem]:
    if not workload.has_old_log_probs_pass:
        return []
    count = batches.num_micro_batches * workload.num_updates_per_rollout
    return [TimeItem("log_probs", "old log-probs: forward", count * update.forward_alone + update.forward_bubble)]


def _train_items(update: UpdateSeconds, workload: Workload) -> list[TimeItem]:
    work = update.forward + update.backward
    seconds = {
        "matrix products": work.matmul,
        "attention": work.attention,
        "element-wise passes": work.memory,
        "recompute": update.recompute,
        "pipeline bubble": update.pipeline_bubble,
        "tensor-parallel communication": work.tensor_parallel,
        "context-parallel communication": work.context_parallel,
        "expert-parallel communication": work.expert_parallel,
        "pipeline-parallel communication": update.pipeline_parallel,
        "data-parallel communication": update.data_parallel,
        "optimizer": update.optimizer,
    }
    count = workload.num_updates_per_rollout
    return [TimeItem("train", name, value * count) for name, value in seconds.items() if value]


def _sync_items(machine: Machine, shape: ModelShape, layout: Layout, owned: float, held: float) -> list[TimeItem]:
    """One stream of bf16 weights through the slowest link on the way; swaps go over PCIe out and back."""
    gpu, efficiency = machine.gpu, machine.efficiency
    engine = layout.engine
    assert engine is not None, "only a layout with engines has a sync"
    num_gpus = layout.world_size + (0 if engine.colocated else engine.num_gpus)
    within_node = num_gpus <= gpu.nvlink_domain_gpus
    rate = gpu.nvlink_gb_per_second * efficiency.link if within_node else gpu.internode_gb_per_second * efficiency.network
    items = [TimeItem("sync", "weights to engines", 2 * num_params(shape) / (rate * 1e9) + SYNC_SECONDS)]
    swapped = SWAPPED_OPTIMIZER_BYTES * owned * layout.swap_optimizer + 2 * held * layout.swap_parameters
    if swapped:
        items.append(TimeItem("sync", "swaps to host memory and back", 2 * swapped / (gpu.pcie_gb_per_second * 1e9)))
    return items
