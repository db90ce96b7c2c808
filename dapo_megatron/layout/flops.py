"""FLOPs of a model by the published convention: 2 per multiply-add, causal attention counted half, no recompute.

Attention over packed sequences costs the sum of their squared lengths; of equal sequences of s tokens that is tokens x s.
"""

from __future__ import annotations

from functools import lru_cache

from dapo_megatron.layout.model_shape import GroupedQueryAttention, ModelShape

TRAINING_PASSES = 3
"""Forward, and twice as much backward."""


@lru_cache(maxsize=4096)
def attention_projection_flops(shape: ModelShape) -> int:
    """Of the projections in and out of one layer's attention, forward, per token."""
    hidden, attention = shape.hidden_size, shape.attention
    if isinstance(attention, GroupedQueryAttention):
        heads, groups, width = attention.num_heads, attention.num_groups, attention.head_dim
        return 2 * hidden * width * (2 * heads + 2 * groups)
    heads, rank = attention.num_heads, attention.q_lora_rank
    query = hidden * rank + rank * heads * attention.query_dim if rank else hidden * heads * attention.query_dim
    latent = hidden * (attention.kv_lora_rank + attention.rope_dim)
    latent += attention.kv_lora_rank * heads * (attention.nope_dim + attention.value_dim)
    return 2 * (query + latent + heads * attention.value_dim * hidden)


@lru_cache(maxsize=4096)
def attention_core_flops(shape: ModelShape) -> int:
    """Of one layer's attention, forward, per squared token of a sequence, the causal half."""
    attention = shape.attention
    if isinstance(attention, GroupedQueryAttention):
        return 2 * attention.num_heads * attention.head_dim
    return attention.num_heads * (attention.query_dim + attention.value_dim)


@lru_cache(maxsize=4096)
def mlp_flops(shape: ModelShape, has_experts: bool) -> int:
    """Of one layer's MLP, forward, per token; of a mixture the experts that a token visits, the shared ones and the router."""
    matrices = 3 if shape.gated else 2
    if not has_experts or shape.experts is None:
        return 2 * matrices * shape.hidden_size * shape.ffn_hidden_size
    experts = shape.experts
    width = experts.num_per_token * experts.ffn_hidden_size + experts.shared_ffn_hidden_size
    return 2 * shape.hidden_size * (matrices * width + experts.num_experts)


def head_flops(shape: ModelShape) -> int:
    """Of the LM head, forward, per token."""
    return 2 * shape.hidden_size * shape.vocab_size


@lru_cache(maxsize=4096)
def _per_token(shape: ModelShape) -> int:
    num_moe = sum(shape.moe_layers)
    total = shape.num_layers * attention_projection_flops(shape) + head_flops(shape)
    total += num_moe * mlp_flops(shape, True) + (shape.num_layers - num_moe) * mlp_flops(shape, False)
    if shape.num_mtp_layers:
        joined = 4 * shape.hidden_size**2
        last = mlp_flops(shape, shape.moe_layers[-1])
        total += shape.num_mtp_layers * (attention_projection_flops(shape) + last + joined + head_flops(shape))
    return total


def forward_flops(shape: ModelShape, num_tokens: float, sum_of_squares: float) -> float:
    """Of one forward pass over `num_tokens` in sequences whose squared lengths add up to `sum_of_squares`."""
    num_layers = shape.num_layers + shape.num_mtp_layers
    return num_tokens * _per_token(shape) + sum_of_squares * num_layers * attention_core_flops(shape)


def training_flops(shape: ModelShape, num_tokens: float, sum_of_squares: float) -> float:
    """Of forward and backward."""
    return TRAINING_PASSES * forward_flops(shape, num_tokens, sum_of_squares)


def training_flops_per_token(shape: ModelShape, sequence_tokens: float) -> float:
    """Of forward and backward in sequences of one length."""
    return training_flops(shape, 1, sequence_tokens)
