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


def layer_tensors(
    shape: ModelShape, has_experts: bool, dropout: bool, score_tokens: int, width: int, linear_width: float | None = None
) -> tuple[Kept, ...]:
    """Everything a layer keeps without recompute; `width` is the bytes of an activation's element.

    `score_tokens`: keys that each query's scores are kept for; 0 with flash attention. `linear_width`: bytes of an element of what linear
    layers keep of their inputs, where that is a copy in low precision; None: the input itself.
    """
    linear, has_copies = (width, False) if linear_width is None else (linear_width, True)
    if isinstance(shape.attention, LatentAttention):
        attention = _latent_attention(shape, width, linear)
        output = shape.attention.num_heads * shape.attention.value_dim
    else:
        attention = _attention(shape, width, linear)
        output = shape.attention.num_heads * shape.attention.head_dim
    masks = (Kept("attention", 2 * shape.hidden_size, "sequence"),) if dropout else ()
    scores = (Kept("attention", width * shape.attention.num_heads * score_tokens, "tensor", _CORE),) if score_tokens else ()
    # The attention kernel and the router keep their own tensor, so that a linear layer's copy of it comes on top.
    copies = (Kept("attention", linear * output, "tensor"),) if has_copies else ()
    rest = _moe(shape, width, linear, has_copies) if has_experts else _dense_mlp(shape, width, linear)
    return (*attention, *copies, *masks, *scores, *rest)


def _attention(shape: ModelShape, width: int, linear: float) -> tuple[Kept, ...]:
    attention = shape.attention
    assert not isinstance(attention, LatentAttention)
    queries, keys = width * attention.num_heads * attention.head_dim, width * attention.num_groups * attention.head_dim
    return (
        Kept("attention", (width + linear) * shape.hidden_size, "sequence"),  # input (the residual) and normed input
        Kept("attention", queries + 2 * keys, "tensor"),  # what the projection gave: values are a view of it
        *((Kept("attention", queries + keys, "tensor"),) if attention.qk_norm else ()),  # inputs of both norms
        Kept("attention", queries + keys, "tensor"),  # rotated queries and keys
        Kept("attention", queries, "tensor"),  # attention output, the input of the output projection
        Kept("attention", 4 * attention.num_heads, "tensor", _CORE),  # fp32 log-sum-exp of each head
    )


def _latent_attention(shape: ModelShape, width: int, linear: float) -> tuple[Kept, ...]:
    attention = shape.attention
    assert isinstance(attention, LatentAttention)
    heads, query_latent = width * attention.num_heads, attention.q_lora_rank or 0
    key_latent, key_rope = attention.kv_lora_rank, attention.rope_dim
    return (
        Kept("attention", width * shape.hidden_size, "sequence"),  # input
        Kept("attention", linear * shape.hidden_size, "sequence", _NORM),  # normed input
        Kept("attention", width * 2 * query_latent, "sequence"),  # query latent and a contiguous copy
        Kept("attention", linear * query_latent, "sequence", _UP),  # its norm
        Kept("attention", width * (key_latent + key_rope), "sequence"),  # key/value latent with the rotated part of the key
        Kept("attention", width * key_latent, "sequence"),  # the latent alone
        Kept("attention", linear * key_latent, "sequence", _UP),  # its norm
        Kept("attention", heads * 2 * attention.query_dim, "tensor", _UP),  # queries and keys
        Kept("attention", heads * attention.value_dim, "tensor", _UP),  # values
        Kept("attention", heads * attention.value_dim, "tensor"),  # attention output
        Kept("attention", 4 * attention.num_heads, "tensor", _CORE),
    )


def _dense_mlp(shape: ModelShape, width: int, linear: float) -> tuple[Kept, ...]:
    h, f = shape.hidden_size, shape.ffn_hidden_size
    return (
        Kept("mlp", width * h, "sequence"),  # input (the residual)
        Kept("mlp", linear * h, "sequence", _MLP),  # normed input
        Kept("mlp", width * (2 if shape.gated else 1) * f, "tensor", _MLP),  # input of the activation function
        Kept("mlp", linear * f, "tensor", _MLP),  # its output
    )


def _moe(shape: ModelShape, width: int, linear: float, has_copies: bool) -> tuple[Kept, ...]:
    experts, h = shape.experts, shape.hidden_size
    assert experts is not None
    gates, f, shared = 2 if shape.gated else 1, experts.ffn_hidden_size, experts.shared_ffn_hidden_size
    return (
        Kept("experts", width * h, "sequence"),  # input (the residual)
        Kept("experts", width * h, "sequence", _NORM),  # normed input
        Kept("experts", 12 * experts.num_experts, "sequence", _MOE),  # logits, scores and probabilities, fp32
        Kept("experts", linear * h, "routed", _MOE),  # a copy for each expert
        Kept("experts", width * gates * f, "routed_tensor", _MOE),  # input of the activation function
        Kept("experts", linear * f, "routed_tensor", _MOE | {"moe_act"}),  # its output
        *((Kept("experts", (width * gates + linear) * shared, "tensor", _MOE | {"shared_experts"}),) if shared else ()),
        *((Kept("experts", linear * h, "sequence", _MOE | {"shared_experts"}),) if shared and has_copies else ()),
    )
