"""What a layer keeps of a forward pass for its backward pass, in bytes per token, and what either needs for a moment.

Letters as in megatron-core: h hidden, a heads, g groups, d head width, f MLP width, E experts, k experts per token. All kept tensors
are listed one by one with what the layer does with them; nothing here is measured or fitted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from dapo_megatron.layout.layout import Layout, RecomputedPart
from dapo_megatron.layout.memory_records import Kernels, MemoryOptions
from dapo_megatron.layout.model_shape import LatentAttention, ModelShape

Extent = Literal["sequence", "tensor", "whole", "routed", "routed_tensor"]
"""Over which ranks a tensor is cut: sequence, over tensor-parallel ranks under sequence parallelism alone; tensor, always; routed, one
copy of a token for each of its experts, whole; routed_tensor, the same, cut over expert-tensor-parallel ranks; whole, never."""
Part = Literal["attention", "mlp", "experts"]


@dataclass(frozen=True, slots=True)
class Kept:
    """A tensor of `token_bytes` bytes per token that lives until the backward pass."""

    part: Part
    token_bytes: float
    extent: Extent
    dropped_by: frozenset[RecomputedPart] = frozenset()
    """Selective recompute of any of these computes it again."""


@dataclass(frozen=True, slots=True)
class LayerActivations:
    """Bytes per token of a micro-batch on one rank (after context parallelism)."""

    attention: float
    mlp: float
    experts: float
    input: float
    """The layer's input alone, which full recompute keeps."""
    transient: float
    """The most that its backward pass needs on top of what is kept."""
    recomputed: float
    """Kept tensors that the backward pass of this layer builds again for as long as it runs."""

    @property
    def kept(self) -> float:
        """Everything kept."""
        return self.attention + self.mlp + self.experts


@dataclass(frozen=True, slots=True)
class _Cut:
    """Share of a token's bytes that a rank holds, by extent."""

    sequence: float
    tensor: float
    routed: float
    routed_tensor: float

    def of(self, extent: Extent) -> float:
        return 1.0 if extent == "whole" else getattr(self, extent)


def layer_activations(shape: ModelShape, has_experts: bool, layout: Layout, options: MemoryOptions) -> LayerActivations:
    """Of one layer under the layout's tensor, sequence and expert parallelism and its recompute."""
    return _layer_activations(
        shape,
        has_experts,
        layout.tensor_parallel_size,
        layout.sequence_parallel,
        layout.expert_tensor_parallel_size,
        layout.recompute.modules if layout.recompute.granularity == "selective" else frozenset(),
        options.kernels,
        options.dropout,
        0 if options.flash_attention else options.sequence_tokens,
        options.expert_imbalance,
        options.precision.activation_bytes,
    )


@lru_cache(maxsize=1024)
def _layer_activations(
    shape: ModelShape,
    has_experts: bool,
    tensor_parallel_size: int,
    sequence_parallel: bool,
    expert_tensor_parallel_size: int,
    recomputed: frozenset[RecomputedPart],
    kernels: Kernels,
    dropout: bool,
    score_tokens: int,
    expert_imbalance: float,
    width: int,
) -> LayerActivations:
    per_token = shape.experts.num_per_token if shape.experts else 0
    sequence = 1 / tensor_parallel_size if sequence_parallel else 1.0
    cut = _Cut(
        sequence=sequence,
        tensor=1 / tensor_parallel_size,
        routed=sequence * per_token * expert_imbalance * expert_tensor_parallel_size,
        routed_tensor=sequence * per_token * expert_imbalance,
    )
    kept = layer_tensors(shape, has_experts, kernels, dropout, score_tokens, width)
    live = [tensor for tensor in kept if not tensor.dropped_by & recomputed]

    def total(tensors: Iterable[Kept]) -> float:
        return sum(tensor.token_bytes * cut.of(tensor.extent) for tensor in tensors)

    return LayerActivations(
        attention=total(tensor for tensor in live if tensor.part == "attention"),
        mlp=total(tensor for tensor in live if tensor.part == "mlp"),
        experts=total(tensor for tensor in live if tensor.part == "experts"),
        input=width * shape.hidden_size * cut.sequence,
        transient=_transient(shape, has_experts, cut, width, gathered=sequence_parallel and tensor_parallel_size > 1),
        recomputed=total(tensor for tensor in kept if tensor.dropped_by & recomputed),
    )


@lru_cache(maxsize=256)
def layer_tensors(
    shape: ModelShape, has_experts: bool, kernels: Kernels, dropout: bool, score_tokens: int, width: int
) -> tuple[Kept, ...]:
    """Everything a layer keeps without recompute; `width` is the bytes of an activation's element.

    `score_tokens`: keys that each query's scores are kept for; 0 with flash attention.
    """
    attention = _latent_attention(shape, width) if isinstance(shape.attention, LatentAttention) else _attention(shape, width)
    masks = (Kept("attention", 2 * shape.hidden_size, "sequence"),) if dropout else ()
    scores = (Kept("attention", width * shape.attention.num_heads * score_tokens, "tensor", _CORE),) if score_tokens else ()
    return (*attention, *masks, *scores, *(_moe(shape, width) if has_experts else _dense_mlp(shape, width)))


_MLP = frozenset[RecomputedPart]({"mlp"})
_MOE = frozenset[RecomputedPart]({"moe"})
_NORM = frozenset[RecomputedPart]({"layernorm"})
_UP = frozenset[RecomputedPart]({"mla_up_proj"})
_CORE = frozenset[RecomputedPart]({"core_attn"})


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


def _transient(shape: ModelShape, has_experts: bool, cut: _Cut, width: int, *, gathered: bool) -> float:
    """Backward of the second projection (its gathered gradient, its input's gradient) or of the activation function."""
    gates, h = 2 if shape.gated else 1, width * shape.hidden_size
    if not has_experts:
        f = width * shape.ffn_hidden_size * cut.tensor
        return max(h * cut.sequence + (h if gathered else 0) + f, h * cut.sequence + gates * f)
    assert shape.experts is not None
    f, routed = width * shape.experts.ffn_hidden_size * cut.routed_tensor, h * cut.routed
    return h * cut.sequence + routed + gates * f
