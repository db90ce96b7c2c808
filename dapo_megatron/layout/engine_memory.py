"""Memory of an SGLang engine: weights, KV cache, what it runs in."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from dapo_megatron.layout.layout import EngineLayout
from dapo_megatron.layout.memory_records import MemoryOptions
from dapo_megatron.layout.model_shape import LatentAttention, ModelShape
from dapo_megatron.layout.parameters import embedding_weights, head_weights, layer_weights

GIB = 2**30
CUDA_CONTEXT_BYTES = int(0.6 * GIB)
"""Driver context and loaded kernels of one process, outside torch's allocator; 0.5 to 0.7 GiB on Hopper."""
_CHUNKED_PREFILL_TOKENS = 8192
_GRAPH_BATCH = 256
_GRAPH_BYTES_PER_SEQUENCE = 2 * 2**20
"""SGLang sets aside as much per sequence of its largest CUDA graph."""


@dataclass(frozen=True, slots=True)
class EngineMemory:
    """One GPU of an engine; the KV cache takes what `mem_fraction_static` leaves beside the weights."""

    weight_bytes: float
    kv_bytes_per_token: float
    workspace_bytes: float
    """Activations of a chunk of prompt tokens and CUDA graphs."""
    asleep_bytes: float
    """What stays on the GPU while weights and KV cache are released: context and CUDA graphs."""

    def kv_pool_bytes(self, mem_fraction_static: float, gpu_bytes: float) -> float:
        """0 when the weights alone are more than the engine's share."""
        return max(0.0, mem_fraction_static * gpu_bytes - self.weight_bytes)


def engine_memory(shape: ModelShape, engine: EngineLayout, options: MemoryOptions) -> EngineMemory:
    """Of a model under tensor parallelism; latent attention keeps its KV cache whole on every rank."""
    precision = options.precision
    return _engine_memory(
        shape, engine.tensor_parallel_size, precision.engine_weight_bytes, precision.kv_cache_bytes, precision.activation_bytes
    )


@lru_cache(maxsize=512)
def _engine_memory(shape: ModelShape, tp: int, weight_bytes: int, kv_bytes: int, activation_bytes: int) -> EngineMemory:
    elements = 0.0
    for has_experts in set(shape.moe_layers):
        count = shape.moe_layers.count(has_experts)
        elements += count * sum(
            weight.num_elements / (1 if weight.split == "none" else tp) for weight in layer_weights(shape, has_experts)
        )
    vocab = shape.padded_vocab_size(64)
    head = head_weights(shape, vocab)
    elements += sum(
        weight.num_elements / tp for weight in (*embedding_weights(shape, vocab), *(head[:-1] if shape.tied else head))
    )
    graphs = _GRAPH_BATCH * _GRAPH_BYTES_PER_SEQUENCE
    per_token = _prefill_bytes_per_token(shape, tp, activation_bytes)
    return EngineMemory(
        weight_bytes=weight_bytes * elements,
        kv_bytes_per_token=kv_bytes * kv_elements_per_token(shape, tp),
        workspace_bytes=_CHUNKED_PREFILL_TOKENS * per_token + graphs + _GRAPH_BATCH * 4 * vocab,
        asleep_bytes=CUDA_CONTEXT_BYTES + GIB + graphs,
    )


def kv_elements_per_token(shape: ModelShape, tp: int) -> float:
    """Elements of the KV cache that one rank holds for one token; groups are repeated where there are more ranks than groups."""
    attention = shape.attention
    if isinstance(attention, LatentAttention):
        return shape.num_layers * (attention.kv_lora_rank + attention.rope_dim)
    return 2 * shape.num_layers * attention.num_groups * attention.head_dim / min(tp, attention.num_groups)


def _prefill_bytes_per_token(shape: ModelShape, tp: int, width: int) -> float:
    """Residual, normed input and the widest intermediate tensors of a layer, forward only."""
    mlp = shape.ffn_hidden_size * 3 / tp
    if shape.experts is not None:
        mlp = max(mlp, shape.experts.num_per_token * (2 * shape.hidden_size + 3 * shape.experts.ffn_hidden_size / tp))
    return width * (3 * shape.hidden_size + mlp)
