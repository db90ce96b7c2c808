"""Memory of an embedded engine (`rollout.engine.type: hf`): a transformers model that no other rank shares."""

from __future__ import annotations

from dataclasses import dataclass

from dapo_megatron.config.schema import HF_PREFILL_TOKENS
from dapo_megatron.layout.layout import EmbeddedEngine
from dapo_megatron.layout.model_shape import LatentAttention, ModelShape
from dapo_megatron.layout.parameters import num_params

_LOGITS_COPIES = 3
"""fp32 matrices of the whole vocabulary while a token is drawn: logits, probabilities, their running sum."""


@dataclass(frozen=True, slots=True)
class EmbeddedMemory:
    """One engine on its device."""

    weight_bytes: float
    cache_bytes: float
    """Keys and values of every row at its longest. An engine with a process of its own keeps the room when it is idle."""
    workspace_bytes: float


def embedded_memory(shape: ModelShape, engine: EmbeddedEngine) -> EmbeddedMemory:
    """Of the whole model: an embedded engine is not cut over devices, and latent attention keeps its keys and values unfolded."""
    width = engine.element_bytes
    mlp = 3 * shape.ffn_hidden_size
    if shape.experts is not None:
        mlp = max(mlp, shape.experts.num_per_token * (2 * shape.hidden_size + 3 * shape.experts.ffn_hidden_size))
    return EmbeddedMemory(
        weight_bytes=width * num_params(shape),
        cache_bytes=width * engine.num_rows * engine.max_sequence_tokens * _cache_elements(shape),
        workspace_bytes=width * HF_PREFILL_TOKENS * (3 * shape.hidden_size + mlp)
        + _LOGITS_COPIES * 4 * engine.num_rows * shape.vocab_size,
    )


def _cache_elements(shape: ModelShape) -> int:
    """Of one token."""
    attention = shape.attention
    if isinstance(attention, LatentAttention):
        return shape.num_layers * attention.num_heads * (attention.query_dim + attention.value_dim)
    return 2 * shape.num_layers * attention.num_groups * attention.head_dim
