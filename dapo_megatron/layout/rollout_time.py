"""Seconds of generation: a roofline of one decoding step under continuous batching, summed along the distribution of lengths.

Not fitted: rates are those of the GPU table, shares those of `efficiency.py`, the constants below are typical of SGLang with CUDA graphs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from dapo_megatron.layout.flops import attention_core_flops, forward_flops, head_flops
from dapo_megatron.layout.layer_time import Machine
from dapo_megatron.layout.layout import EngineLayout
from dapo_megatron.layout.model_shape import GroupedQueryAttention, ModelShape
from dapo_megatron.layout.parameters import num_active_params, num_params
from dapo_megatron.layout.workload import Workload

STEP_SECONDS = 1.5e-3
"""Scheduler and sampling, of one decoding step."""
LAYER_SECONDS = 20e-6
"""Kernels of one layer behind each other in a CUDA graph, whatever their size."""
ALL_REDUCE_SECONDS = 8e-6
"""Of one small all-reduce; two a layer under tensor parallelism."""
MAX_RUNNING_REQUESTS = 1024
"""Sequences that one engine decodes together at most."""
NUM_WAVES = 2
"""Times the engines run dry in a step that samples in waves and drops groups."""


@dataclass(frozen=True, slots=True)
class RolloutSeconds:
    """Generation of one rollout step; the fields add up to it."""

    prefill: float
    decode: float
    """While at least half of the slots are taken."""
    tail: float
    """From then on, until the longest response ends."""
    batch_size: float
    """Sequences an engine decodes together while its queue lasts; no time."""
    bound: str
    """What a full decoding step waits for: `HBM bandwidth: weights`, `HBM bandwidth: KV cache` or `compute`."""

    @property
    def total(self) -> float:
        """All of it."""
        return self.prefill + self.decode + self.tail


@dataclass(frozen=True, slots=True)
class Decoder:
    """One engine: seconds of a decoding step as a function of batch and context."""

    machine: Machine
    shape: ModelShape
    tensor: int

    @property
    def kv_bytes_per_token(self) -> float:
        """On each GPU of the engine, bf16. The latent of MLA is whole on every one."""
        attention = self.shape.attention
        if isinstance(attention, GroupedQueryAttention):
            return 4 * self.shape.num_layers * attention.head_dim * max(attention.num_groups / self.tensor, 1)
        return 2 * self.shape.num_layers * (attention.kv_lora_rank + attention.rope_dim)

    def weight_bytes(self, batch: NDArray[np.float64]) -> NDArray[np.float64]:
        """bf16 weights that a step reads on each GPU: of the experts those that some token of the batch visits."""
        total, experts = num_params(self.shape), self.shape.experts
        if experts is None:
            return np.full_like(batch, 2 * total / self.tensor)
        active = num_active_params(self.shape)
        routed = (total - active) / (1 - experts.num_per_token / experts.num_experts)
        visited = 1 - (1 - experts.num_per_token / experts.num_experts) ** batch
        return 2 * (total - routed + routed * visited) / self.tensor

    def parts(self, batch: NDArray[np.float64], context: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
        """Seconds for weights, for the KV cache, for arithmetic, and the constant part, of a step of `batch` sequences."""
        gpu, efficiency = self.machine.gpu, self.machine.efficiency
        bandwidth = gpu.hbm_gb_per_second * 1e9 * efficiency.memory
        flops = batch * (
            2 * num_active_params(self.shape) + 2 * self.shape.num_layers * attention_core_flops(self.shape) * context
        )
        arithmetic = flops / self.tensor / (gpu.bf16_tflops * 1e12 * efficiency.matmul)
        constant = np.full_like(batch, STEP_SECONDS + self.shape.num_layers * LAYER_SECONDS)
        if self.tensor > 1:
            rate, _ = self.machine.link(self.tensor, 1)
            reduced = 2 * 2 * batch * self.shape.hidden_size * 2 / rate
            constant = constant + self.shape.num_layers * (2 * ALL_REDUCE_SECONDS + reduced)
        return (
            self.weight_bytes(batch) / bandwidth,
            batch * context * self.kv_bytes_per_token / bandwidth,
            arithmetic,
            constant,
        )

    def step_seconds(self, batch: NDArray[np.float64], context: NDArray[np.float64]) -> NDArray[np.float64]:
        """Weights are read beside the arithmetic on them; the cache is read by a kernel of its own."""
        weights, cache, arithmetic, constant = self.parts(batch, context)
        return np.maximum(weights, arithmetic) + cache + constant


@lru_cache(maxsize=2048)
def rollout_seconds(
    machine: Machine, shape: ModelShape, engine: EngineLayout, workload: Workload, kv_cache_tokens: int
) -> RolloutSeconds:
    """Generation of all groups of a step; `kv_cache_tokens` fit into the cache of one engine."""
    decoder = Decoder(machine, shape, engine.tensor_parallel_size)
    lengths = workload.response_lengths()
    num_sequences = workload.num_samples_per_step * workload.over_sampling / engine.num_engines
    waves = NUM_WAVES if workload.sampler == "waves" and workload.over_sampling > 1 else 1
    # The first wave asks for the prompts of the step, later ones for what was dropped.
    shares = [1.0] if waves == 1 else [1 / workload.over_sampling, 1 - 1 / workload.over_sampling]
    decode = tail = 0.0
    for share in shares:
        full, drained = _generation(decoder, lengths, workload.prompt_tokens, num_sequences * share, kv_cache_tokens)
        decode, tail = decode + full, tail + drained
    batch = _slots(lengths, workload.prompt_tokens, num_sequences * shares[0], kv_cache_tokens)
    return RolloutSeconds(
        prefill=_prefill(machine, shape, engine, workload),
        decode=decode,
        tail=tail,
        batch_size=batch,
        bound=_bound(decoder, batch, workload.prompt_tokens + _mean_context(lengths)),
    )


def _mean_context(lengths: NDArray[np.float64]) -> float:
    """Response tokens that a sequence has so far, seen at a random moment of decoding."""
    return float((lengths**2).sum() / lengths.sum() / 2)


def _slots(lengths: NDArray[np.float64], prompt_tokens: float, num_sequences: float, kv_cache_tokens: int) -> float:
    """Sequences that are decoded together: as many as there are, as the engine takes, and as the KV cache holds."""
    return max(1.0, min(num_sequences, MAX_RUNNING_REQUESTS, kv_cache_tokens / (prompt_tokens + _mean_context(lengths))))


def _generation(
    decoder: Decoder, lengths: NDArray[np.float64], prompt_tokens: float, num_sequences: float, kv_cache_tokens: int
) -> tuple[float, float]:
    """Seconds with at least half of the slots taken, and seconds after that, of one engine."""
    slots = _slots(lengths, prompt_tokens, num_sequences, kv_cache_tokens)
    queued = max(0.0, num_sequences - slots)
    full = 0.0
    if queued:
        batch, context = np.array([slots]), np.array([prompt_tokens + _mean_context(lengths)])
        full = queued * float(lengths.mean()) / slots * float(decoder.step_seconds(batch, context)[0])
    # What is left are `slots` sequences: all new when nothing was queued, at a random point of their length otherwise.
    ends = np.concatenate([[0.0], lengths])
    alive = 1 - np.arange(len(lengths)) / len(lengths)
    if queued:
        spans = np.diff(ends)
        left = np.cumsum((alive * spans)[::-1])[::-1]
        alive = left / left[0]
    middles = (ends[1:] + ends[:-1]) / 2
    active = slots * alive
    # The longest response is drawn by one sequence at least, unless there are too few to draw it at all.
    batch = np.where(active >= 0.5, np.maximum(active, 1.0), 0.0)
    context = prompt_tokens + middles + (_mean_context(lengths) if queued else 0.0)
    seconds = decoder.step_seconds(np.maximum(batch, 1.0), context) * np.diff(ends) * (batch > 0)
    is_tail = active < slots / 2
    return full + float(seconds[~is_tail].sum()), float(seconds[is_tail].sum())


def _prefill(machine: Machine, shape: ModelShape, engine: EngineLayout, workload: Workload) -> float:
    """Each prompt once on its engine, for all samples of its group; without the LM head."""
    num_prompts = workload.num_prompts_per_step * workload.over_sampling / engine.num_engines
    tokens = num_prompts * workload.prompt_tokens
    flops = forward_flops(shape, tokens, tokens * workload.prompt_tokens) - tokens * head_flops(shape)
    efficiency = machine.efficiency
    return flops / engine.tensor_parallel_size / (machine.gpu.bf16_tflops * 1e12 * efficiency.matmul)


def _bound(decoder: Decoder, batch: float, context: float) -> str:
    weights, cache, arithmetic, constant = (float(part[0]) for part in decoder.parts(np.array([batch]), np.array([context])))
    parts = {
        "HBM bandwidth: weights": weights,
        "HBM bandwidth: KV cache": cache,
        "compute": arithmetic,
        "launches and all-reduces": constant,
    }
    return max(parts, key=lambda name: parts[name])
