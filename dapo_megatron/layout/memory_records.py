"""What the memory model takes besides a model and a layout, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Kernels = Literal["transformer_engine", "local"]
"""The two layer implementations; they keep different tensors for the backward pass."""
HeadLoss = Literal["chunked", "fused", "unfused"]
"""chunked: our own head, logits of some tokens at a time. fused, unfused: megatron-core's cross-entropy over all tokens."""
Phase = Literal["train", "log_probs", "rollout", "sync"]


@dataclass(frozen=True, slots=True)
class Precision:
    """Bytes of one element, by what it belongs to. The defaults: bf16 training, fp32 gradients and fp32 Adam."""

    weight_bytes: int = 2
    activation_bytes: int = 2
    grad_bytes: int = 4
    master_bytes: int = 4
    """The optimizer's own copy of the weights; 0: none (weights in fp32)."""
    moment_bytes: int = 4
    """Each of Adam's two moments; 2 with a precision-aware optimizer in bf16."""
    linear_weight_bytes: float | None = None
    """Of a linear layer's weight in all its copies. None: `weight_bytes`. fp8 data and transpose 2; both beside the bf16 weight 4."""
    linear_input_bytes: float | None = None
    """Of what a linear layer keeps of its input for the gradient of its weight. None: `activation_bytes`. 1 in fp8."""
    kv_cache_bytes: int = 2
    engine_weight_bytes: int = 2

    @property
    def linear_copy_bytes(self) -> float:
        """Of a linear layer's weight, on top of the weight itself."""
        return 0.0 if self.linear_weight_bytes is None else self.linear_weight_bytes - self.weight_bytes


@dataclass(frozen=True, slots=True)
class MemoryOptions:
    """What decides memory besides model and layout. The defaults are this project on GPUs."""

    kernels: Kernels = "transformer_engine"
    head_loss: HeadLoss = "chunked"
    precision: Precision = Precision()
    fused_grad_accumulation: bool = False
    """Linear layers add their gradients to the fp32 buffers themselves (Megatron-LM's default), at the price of dummy gradients."""
    flash_attention: bool = True
    """False: attention keeps the matrix of scores of every head."""
    sequence_tokens: int = 0
    """Longest sequence, for `flash_attention` False."""
    layers: tuple[tuple[range, ...], ...] | None = None
    """Layer numbers by [stage][chunk], where a pipeline is cut by hand. None: as megatron-core cuts it."""
    fully_sharded: bool = False
    """FSDP: weights, gradients and optimizer state are all sharded over data-parallel ranks."""
    vocab_multiple: int = 1
    """The padded vocabulary is a multiple of this times the tensor-parallel size; Megatron-LM's default is 128."""
    dropout: bool = False
    """Hidden dropout in training, which keeps a mask."""
    expert_imbalance: float = 1.2
    """Tokens of the busiest expert-parallel rank over the mean. The policy is trained without a balancing loss, so some room is left;
    published pretraining balances, 1."""
    varying_sizes: bool = True
    """Micro-batches differ in size, as packs of whole sequences do; published pretraining has one length."""
    weight_bucket_bytes: int = 512 * 2**20
    """Size of one piece of the weight sync."""
    disk_bytes_per_second: float = 2e9
    """Of one node, for the time of a checkpoint."""
    gpus_per_node: int = 8


DEFAULT_OPTIONS = MemoryOptions()
"""This project on GPUs."""


@dataclass(frozen=True, slots=True)
class MemoryItem:
    """One line of an account of device memory."""

    name: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class PhaseMemory:
    """Device memory of one GPU at the fullest moment of a phase, by item; the items add up."""

    phase: Phase
    items: tuple[MemoryItem, ...]

    total_bytes: int = field(init=False, compare=False)
    """Everything, the parts outside torch's allocator and the margin too."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "total_bytes", sum([item.num_bytes for item in self.items]))

    def bytes_of(self, name: str) -> int:
        """The item of that name; 0 where there is none."""
        return sum(item.num_bytes for item in self.items if item.name == name)


@dataclass(frozen=True, slots=True)
class StageMemory:
    """One GPU of a pipeline stage, in all phases; `stage` counts from 0."""

    stage: int
    phases: tuple[PhaseMemory, ...]

    @property
    def peak(self) -> PhaseMemory:
        """The fullest phase."""
        return max(self.phases, key=lambda phase: phase.total_bytes)


@dataclass(frozen=True, slots=True)
class CheckpointMemory:
    """A complete checkpoint: weights and optimizer state of the whole model."""

    weight_bytes: int
    optimizer_bytes: int
    save_seconds: float
    """At `disk_bytes_per_second` of every node."""

    @property
    def total_bytes(self) -> int:
        """On disk."""
        return self.weight_bytes + self.optimizer_bytes


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Memory of a layout: device memory per stage, host memory of the fullest node, checkpoint, KV cache."""

    stages: tuple[StageMemory, ...]
    host_items: tuple[MemoryItem, ...]
    checkpoint: CheckpointMemory
    engine: PhaseMemory | None
    """A GPU of an engine that has its own; None where engines and actor take turns on the same, or there are none."""
    kv_cache_tokens: int | None
    """Tokens that the KV cache of one engine holds; None without engines."""

    @property
    def fullest(self) -> StageMemory:
        """The stage with the highest peak."""
        return max(self.stages, key=lambda stage: stage.peak.total_bytes)

    @property
    def peak_bytes(self) -> int:
        """Of the fullest stage, everything counted."""
        return self.fullest.peak.total_bytes

    @property
    def host_bytes(self) -> int:
        """Host memory of one node."""
        return sum(item.num_bytes for item in self.host_items)
