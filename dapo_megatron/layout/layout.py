"""`Layout`: how one model is spread over devices. Its fields bear the names of the configuration."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

Granularity = Literal["none", "selective", "full"]
RecomputedPart = Literal["core_attn", "layernorm", "moe_act", "mlp", "moe", "mla_up_proj", "shared_experts"]


@dataclass(frozen=True, slots=True)
class Recompute:
    """Which activations are computed a second time in the backward pass instead of kept.

    `modules` (selective) are megatron-core's names. Full keeps only the inputs of layers: `uniform` of groups of `num_layers` layers,
    `block` of the first `num_layers` layers of a chunk, while the others keep everything.
    """

    granularity: Granularity = "none"
    modules: frozenset[RecomputedPart] = frozenset()
    method: Literal["uniform", "block"] = "uniform"
    num_layers: int = 1

    def __str__(self) -> str:
        if self.granularity == "selective":
            return "+".join(sorted(self.modules))
        if self.granularity == "full" and self.method == "block":
            return f"full, {self.num_layers} layers a chunk"
        return self.granularity


NO_RECOMPUTE = Recompute()
FULL_RECOMPUTE = Recompute("full")


@dataclass(frozen=True, slots=True)
class EngineLayout:
    """The rollout side: `num_engines` SGLang servers of `tensor_parallel_size` GPUs each.

    `mem_fraction_static` is the share of a device for the engine's weights and KV cache.
    """

    tensor_parallel_size: int = 1
    num_engines: int = 1
    mem_fraction_static: float = 0.85
    colocated: bool = True
    """Engines and actor ranks take turns on the same devices."""

    @property
    def num_gpus(self) -> int:
        """Devices of all engines."""
        return self.tensor_parallel_size * self.num_engines


@dataclass(frozen=True, slots=True)
class EmbeddedEngine:
    """The rollout side without servers: `num_engines` whole models, each on one device, which they keep while the actor trains."""

    num_engines: int = 1
    num_rows: int = 256
    """Sequences decoded together."""
    max_sequence_tokens: int = 21504
    """Of prompt and response."""
    element_bytes: int = 4
    """Of a weight and of a key."""
    colocated: bool = True
    """On the devices of actor ranks; False: on their own."""
    has_own_process: bool = True
    """False: in the rank's own process, whose allocator takes back what an idle engine does not need."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The actor's ranks, and the engines where there are any. Rules of validity are in `config/checks.py`, not here."""

    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    virtual_pipeline_size: int | None = None
    num_layers_in_first_pipeline_stage: int | None = None
    num_layers_in_last_pipeline_stage: int | None = None
    context_parallel_size: int = 1
    expert_parallel_size: int = 1
    expert_tensor_parallel_size: int = 1
    data_parallel_size: int = 1
    """Copies of the model: ranks / (tensor x pipeline x context)."""
    sequence_parallel: bool = False
    use_distributed_optimizer: bool = True
    max_tokens_per_micro_batch: int = 16384
    """Packed tokens of one micro-batch, before context parallelism divides them."""
    num_micro_batches: int = 1
    """Of one data-parallel rank in one optimizer step."""
    recompute: Recompute = NO_RECOMPUTE
    optimizer_offload_fraction: float = 0.0
    """Share of the optimizer's state that lives in host memory, its part of Adam computed there."""
    swap_optimizer: bool = False
    """Optimizer state moves to host memory while engines on the same devices generate."""
    swap_parameters: bool = False
    """Weights and gradients likewise."""
    log_prob_chunk_tokens: int = 1024
    """Tokens whose logits exist at the same time in the LM head."""
    engine: EngineLayout | None = None
    """None: training only, or embedded engines."""
    embedded: EmbeddedEngine | None = None

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of what is not an expert."""
        return self.tensor_parallel_size * self.pipeline_parallel_size * self.context_parallel_size

    @property
    def world_size(self) -> int:
        """Actor ranks."""
        return self.model_parallel_size * self.data_parallel_size

    @property
    def expert_model_parallel_size(self) -> int:
        """Ranks that hold one copy of all experts."""
        return self.pipeline_parallel_size * self.expert_parallel_size * self.expert_tensor_parallel_size

    @property
    def expert_data_parallel_size(self) -> int:
        """Copies of each expert."""
        return self.world_size // self.expert_model_parallel_size

    @property
    def tokens_per_rank(self) -> int:
        """Tokens of a micro-batch on one context-parallel rank."""
        return math.ceil(self.max_tokens_per_micro_batch / self.context_parallel_size)

    @property
    def num_chunks(self) -> int:
        """Model chunks of a pipeline rank."""
        return self.virtual_pipeline_size or 1

    def layers_per_stage(self, num_layers: int) -> tuple[int, ...]:
        """Layers of each pipeline stage; the stages whose number is not given share the others equally."""
        first, last = self.num_layers_in_first_pipeline_stage, self.num_layers_in_last_pipeline_stage
        given = [count for count in (first, last) if count is not None]
        num_equal = self.pipeline_parallel_size - len(given)
        equal = (num_layers - sum(given)) // num_equal if num_equal else 0
        head = [] if first is None else [first]
        tail = [] if last is None else [last]
        return (*head, *[equal] * num_equal, *tail)

    def layers_of(self, num_layers: int) -> tuple[tuple[range, ...], ...]:
        """Layer numbers, from 0, by [stage][chunk]: chunk c of all stages comes before chunk c + 1 of any."""
        return _chunks(self.layers_per_stage(num_layers), self.num_chunks)

    def __str__(self) -> str:
        names = {
            "TP": self.tensor_parallel_size,
            "PP": self.pipeline_parallel_size,
            "VPP": self.num_chunks,
            "CP": self.context_parallel_size,
            "EP": self.expert_parallel_size,
            "ETP": self.expert_tensor_parallel_size,
        }
        sizes = [f"{name}{size}" for name, size in names.items() if size > 1]
        stages = [
            f"{end}{count}"
            for end, count in (
                ("first", self.num_layers_in_first_pipeline_stage),
                ("last", self.num_layers_in_last_pipeline_stage),
            )
            if count is not None
        ]
        return " ".join([*sizes, f"DP{self.data_parallel_size}", *stages])


@lru_cache(maxsize=4096)
def _chunks(per_stage: tuple[int, ...], num_chunks: int) -> tuple[tuple[range, ...], ...]:
    per_chunk = [count // num_chunks for count in per_stage]
    starts = [sum(per_chunk[:stage]) for stage in range(len(per_chunk))]
    return tuple(
        tuple(range(chunk * sum(per_chunk) + start, chunk * sum(per_chunk) + start + count) for chunk in range(num_chunks))
        for start, count in zip(starts, per_chunk, strict=True)
    )
