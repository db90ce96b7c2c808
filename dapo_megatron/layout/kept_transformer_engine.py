"""What TransformerEngine's layers keep for the backward pass (megatron-core's TransformerEngine layer spec, flash attention)."""

from __future__ import annotations

from dapo_megatron.layout.kept import Kept
from dapo_megatron.layout.layout import RecomputedPart
from dapo_megatron.layout.model_shape import LatentAttention, ModelShape

_MLP = frozenset[RecomputedPart]({"mlp"})
_MOE = frozenset[RecomputedPart]({"moe"})
_NORM = frozenset[RecomputedPart]({"layernorm"})
_UP = frozenset[RecomputedPart]({"mla_up_proj"})
_CORE = frozenset[RecomputedPart]({"core_attn"})


def layer_tensors(shape: ModelShape, has_experts: bool, dropout: bool, score_tokens: int, width: int) -> tuple[Kept, ...]:
    """Everything a layer keeps without recompute; `width` is the bytes of an activation's element.

    `score_tokens`: keys that each query's scores are kept for; 0 with flash attention.
    """
    attention = _latent_attention(shape, width) if isinstance(shape.attention, LatentAttention) else _attention(shape, width)
    masks = (Kept("attention", 2 * shape.hidden_size, "sequence"),) if dropout else ()
    scores = (Kept("attention", width * shape.attention.num_heads * score_tokens, "tensor", _CORE),) if score_tokens else ()
    return (*attention, *masks, *scores, *(_moe(shape, width) if has_experts else _dense_mlp(shape, width)))


def _attention(shape: ModelShape, width: int) -> tuple[Kept, ...]:
    attention, h = shape.attention, width * shape.hidden_size
    assert not isinstance(attention, LatentAttention)
    queries, keys = width * attention.num_heads * attention.head_dim, width * attention.num_groups * attention.head_dim
    return (
        Kept("attention", 2 * h, "sequence"),  # input (the residual) and normed input
        Kept("attention", queries + 2 * keys, "tensor"),  # what the projection gave: values are a view of it
        *((Kept("attention", queries + keys, "tensor"),) if attention.qk_norm else ()),  # inputs of both norms
        Kept("attention", queries + keys, "tensor"),  # rotated queries and keys
        Kept("attention", queries, "tensor"),  # attention output, the input of the output projection
        Kept("attention", 4 * attention.num_heads, "tensor", _CORE),  # fp32 log-sum-exp of each head
    )


def _latent_attention(shape: ModelShape, width: int) -> tuple[Kept, ...]:
    attention, h = shape.attention, width * shape.hidden_size
    assert isinstance(attention, LatentAttention)
    heads = width * attention.num_heads
    query_latent = width * (attention.q_lora_rank or 0)
    key_latent, key_rope = width * attention.kv_lora_rank, width * attention.rope_dim
    return (
        Kept("attention", h, "sequence"),  # input
        Kept("attention", h, "sequence", _NORM),  # normed input
        Kept("attention", 2 * query_latent, "sequence"),  # query latent and a contiguous copy
        Kept("attention", query_latent, "sequence", _UP),  # its norm
        Kept("attention", key_latent + key_rope, "sequence"),  # key/value latent with the rotated part of the key
        Kept("attention", key_latent, "sequence"),  # the latent alone
        Kept("attention", key_latent, "sequence", _UP),  # its norm
        Kept("attention", heads * 2 * attention.query_dim, "tensor", _UP),  # queries and keys
        Kept("attention", heads * attention.value_dim, "tensor", _UP),  # values
        Kept("attention", heads * attention.value_dim, "tensor"),  # attention output
        Kept("attention", 4 * attention.num_heads, "tensor", _CORE),
    )


def _dense_mlp(shape: ModelShape, width: int) -> tuple[Kept, ...]:
    h, f = width * shape.hidden_size, width * shape.ffn_hidden_size
    return (
        Kept("mlp", h, "sequence"),  # input (the residual)
        Kept("mlp", h, "sequence", _MLP),  # normed input
        Kept("mlp", (2 if shape.gated else 1) * f, "tensor", _MLP),  # input of the activation function
        Kept("mlp", f, "tensor", _MLP),  # its output
    )


def _moe(shape: ModelShape, width: int) -> tuple[Kept, ...]:
    experts, h = shape.experts, width * shape.hidden_size
    assert experts is not None
    gates, f, shared = 2 if shape.gated else 1, width * experts.ffn_hidden_size, width * experts.shared_ffn_hidden_size
    return (
        Kept("experts", h, "sequence"),  # input (the residual)
        Kept("experts", h, "sequence", _NORM),  # normed input
        Kept("experts", 12 * experts.num_experts, "sequence", _MOE),  # logits, scores and probabilities, fp32
        Kept("experts", h, "routed", _MOE),  # a copy for each expert
        Kept("experts", gates * f, "routed_tensor", _MOE),  # input of the activation function
        Kept("experts", f, "routed_tensor", _MOE | {"moe_act"}),  # its output
        *((Kept("experts", (gates + 1) * shared, "tensor", _MOE | {"shared_experts"}),) if shared else ()),
    )
