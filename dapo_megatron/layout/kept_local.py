"""What the layers of the local spec keep for the backward pass: torch's own kernels, as the ranks run them on CPUs (`models/spec.py`).

Norms keep their input and the reciprocal root; in bf16 they compute in fp32 and keep a copy of their input and its normed form. SwiGLU keeps
its input; attention keeps queries, keys and values gathered into its tiles. Sequences of a micro-batch are taken to be equally long and to share
no prompt: tiles are then the packed tokens themselves. What context-parallel ranks gather of each other's keys and values is not counted.
"""

from __future__ import annotations

from dapo_megatron.layout.kept import Extent, Kept, Part
from dapo_megatron.layout.layout import RecomputedPart
from dapo_megatron.layout.model_shape import LatentAttention, ModelShape

_MLP = frozenset[RecomputedPart]({"mlp"})
_MOE = frozenset[RecomputedPart]({"moe"})


def layer_tensors(shape: ModelShape, has_experts: bool, score_tokens: int, width: int) -> tuple[Kept, ...]:
    """Everything a layer keeps; arguments as in `kept_transformer_engine`. Latent attention has no flash kernel and keeps its scores."""
    latent = isinstance(shape.attention, LatentAttention)
    attention = _latent_attention(shape, score_tokens, width) if latent else _attention(shape, width)
    return (*attention, *(_moe(shape, width) if has_experts else _dense_mlp(shape, width)))


def norm_bytes(elements: int, width: int, num_norms: int = 1) -> int:
    """`elements` of all norms together, each of which has a reciprocal root."""
    return (4 if width == 4 else 8) * elements + 4 * num_norms


def _norm(part: Part, elements: int, width: int, extent: Extent, num_norms: int = 1) -> Kept:
    return Kept(part, norm_bytes(elements, width, num_norms), extent)


def _attention(shape: ModelShape, width: int) -> tuple[Kept, ...]:
    attention, h = shape.attention, shape.hidden_size
    assert not isinstance(attention, LatentAttention)
    queries, keys = attention.num_heads * attention.head_dim, attention.num_groups * attention.head_dim
    return (
        _norm("attention", h, width, "sequence"),
        Kept("attention", width * h, "sequence"),  # input of the projection
        *(
            (_norm("attention", queries + keys, width, "tensor", attention.num_heads + attention.num_groups),)
            if attention.qk_norm
            else ()
        ),
        Kept("attention", width * (queries + 2 * keys), "tensor"),  # queries and keys rotated
        Kept("attention", width * queries, "tensor"),  # attention output
        Kept("attention", 4 * attention.num_heads, "tensor"),  # log-sum-exp
    )


def _latent_attention(shape: ModelShape, score_tokens: int, width: int) -> tuple[Kept, ...]:
    attention, h = shape.attention, shape.hidden_size
    assert isinstance(attention, LatentAttention)
    heads, latent, query_latent = attention.num_heads, attention.kv_lora_rank, attention.q_lora_rank or 0
    return (
        _norm("attention", h, width, "sequence"),
        Kept("attention", width * h, "sequence"),
        *(
            (_norm("attention", query_latent, width, "sequence"), Kept("attention", width * query_latent, "sequence"))
            if query_latent
            else ()
        ),
        _norm("attention", latent, width, "sequence"),
        Kept("attention", width * latent, "sequence"),
        Kept("attention", 4 * width * attention.rope_dim, "whole"),
        Kept("attention", 4 * heads * (2 * attention.query_dim + attention.value_dim + score_tokens), "tensor"),  # all in fp32
        Kept("attention", width * heads * attention.value_dim, "tensor"),  # input of the output projection
    )


def _dense_mlp(shape: ModelShape, width: int) -> tuple[Kept, ...]:
    h, f = shape.hidden_size, shape.ffn_hidden_size
    return (
        _norm("mlp", h, width, "sequence"),
        Kept("mlp", width * h, "sequence", _MLP),
        Kept("mlp", 3 * width * f, "tensor", _MLP),  # gate and up, product
    )


def _moe(shape: ModelShape, width: int) -> tuple[Kept, ...]:
    experts, h = shape.experts, shape.hidden_size
    assert experts is not None
    shared = experts.shared_ffn_hidden_size
    return (
        _norm("experts", h, width, "sequence"),
        Kept("experts", width * h, "sequence"),
        Kept("experts", 4 * experts.num_per_token, "sequence", _MOE),  # probabilities of the chosen experts
        Kept("experts", width * h, "routed", _MOE),
        Kept(
            "experts", 4 * width * experts.ffn_hidden_size + 4, "routed_tensor", _MOE
        ),  # as in the MLP, and the weighted product
        *((Kept("experts", 3 * width * shared, "tensor", _MOE),) if shared else ()),
    )
