"""Weight matrices of a decoder, in whole and as one rank holds them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from math import lcm
from typing import Literal

from dapo_megatron.layout.layout import Layout
from dapo_megatron.layout.memory_records import Kernels
from dapo_megatron.layout.model_shape import LatentAttention, ModelShape

Split = Literal["none", "tensor", "expert"]


@dataclass(frozen=True, slots=True)
class Weight:
    """`copies` parameters of `rows` x `columns` elements each (vectors: one column).

    none: whole on every rank. tensor: cut over tensor-parallel ranks. expert: copies over expert-parallel ranks, each copy cut over
    expert-tensor-parallel ranks.
    """

    rows: int
    columns: int
    split: Split
    copies: int = 1

    @property
    def num_elements(self) -> int:
        """Of all copies, over all ranks."""
        return self.rows * self.columns * self.copies


@dataclass(frozen=True, slots=True)
class RankParameters:
    """Elements that one rank holds, and how many once megatron-core has aligned them in its buffers."""

    dense: int = 0
    expert: int = 0
    """Of matrices cut over expert-parallel ranks; their copies are on fewer ranks."""
    aligned_dense: int = 0
    aligned_expert: int = 0

    @property
    def total(self) -> int:
        """Without padding."""
        return self.dense + self.expert

    @property
    def aligned_total(self) -> int:
        """With it."""
        return self.aligned_dense + self.aligned_expert

    def __add__(self, other: RankParameters) -> RankParameters:
        return RankParameters(
            self.dense + other.dense,
            self.expert + other.expert,
            self.aligned_dense + other.aligned_dense,
            self.aligned_expert + other.aligned_expert,
        )

    def __mul__(self, count: int) -> RankParameters:
        return RankParameters(self.dense * count, self.expert * count, self.aligned_dense * count, self.aligned_expert * count)


@lru_cache(maxsize=256)
def layer_weights(shape: ModelShape, has_experts: bool, kernels: Kernels = "transformer_engine") -> tuple[Weight, ...]:
    """Of one layer. Without TransformerEngine the down projections of latent attention are cut over tensor-parallel ranks too."""
    return (*_attention_weights(shape, kernels), *(_moe_weights(shape) if has_experts else _dense_mlp_weights(shape)))


def embedding_weights(shape: ModelShape, padded_vocab_size: int) -> tuple[Weight, ...]:
    """Of the first stage."""
    return (Weight(padded_vocab_size, shape.hidden_size, "tensor"),)


def head_weights(shape: ModelShape, padded_vocab_size: int) -> tuple[Weight, ...]:
    """Final norm and LM head of the last stage, which has its own copy of a tied matrix where there are several stages."""
    return (*_norm(shape, shape.hidden_size), Weight(padded_vocab_size, shape.hidden_size, "tensor"))


def mtp_weights(shape: ModelShape, kernels: Kernels) -> tuple[Weight, ...]:
    """One multi-token-prediction layer: norms of both inputs, their projection, a layer like the last one, a final norm."""
    h = shape.hidden_size
    return (*_norm(shape, h) * 3, Weight(h, 2 * h, "tensor"), *layer_weights(shape, shape.moe_layers[-1], kernels))


@lru_cache(maxsize=256)
def num_params(shape: ModelShape) -> int:
    """Parameters of the model without padding and without multi-token prediction."""
    return _sum(shape, active=False)


@lru_cache(maxsize=256)
def num_active_params(shape: ModelShape) -> int:
    """Those that one token passes through: of the routed experts only its own."""
    return _sum(shape, active=True)


def _sum(shape: ModelShape, *, active: bool) -> int:
    total = shape.vocab_size * shape.hidden_size * (1 if shape.tied else 2) + sum(
        weight.num_elements for weight in _norm(shape, shape.hidden_size)
    )
    for has_experts in set(shape.moe_layers):
        for weight in layer_weights(shape, has_experts):
            elements = weight.num_elements
            if active and weight.split == "expert" and shape.experts is not None:
                elements = elements // shape.experts.num_experts * shape.experts.num_per_token
            total += elements * shape.moe_layers.count(has_experts)
    return total


def _attention_weights(shape: ModelShape, kernels: Kernels) -> tuple[Weight, ...]:
    h, attention = shape.hidden_size, shape.attention
    if isinstance(attention, LatentAttention):
        return _latent_attention_weights(shape, attention, "none" if kernels == "transformer_engine" else "tensor")
    queries = attention.num_heads * attention.head_dim
    rows = queries + 2 * attention.num_groups * attention.head_dim
    return (
        *_norm(shape, h),
        Weight(rows, h, "tensor"),
        *((Weight(rows, 1, "tensor"),) if attention.qkv_bias else ()),
        *((*_norm(shape, attention.head_dim), *_norm(shape, attention.head_dim)) if attention.qk_norm else ()),
        Weight(h, queries, "tensor"),
        *((Weight(h, 1, "none"),) if shape.linear_bias else ()),
    )


def _latent_attention_weights(shape: ModelShape, attention: LatentAttention, down: Split) -> tuple[Weight, ...]:
    h, heads, latent = shape.hidden_size, attention.num_heads, attention.kv_lora_rank
    rank = attention.q_lora_rank
    queries = (
        (Weight(heads * attention.query_dim, h, "tensor"),)
        if rank is None
        else (Weight(rank, h, down), *_norm(shape, rank), Weight(heads * attention.query_dim, rank, "tensor"))
    )
    return (
        *_norm(shape, h),
        *queries,
        Weight(latent + attention.rope_dim, h, down),
        *_norm(shape, latent),
        Weight(heads * (attention.nope_dim + attention.value_dim), latent, "tensor"),
        Weight(h, heads * attention.value_dim, "tensor"),
    )


def _dense_mlp_weights(shape: ModelShape) -> tuple[Weight, ...]:
    h, width = shape.hidden_size, shape.ffn_hidden_size
    rows = width * (2 if shape.gated else 1)
    biases = (Weight(rows, 1, "tensor"), Weight(h, 1, "none")) if shape.linear_bias else ()
    return (*_norm(shape, h), Weight(rows, h, "tensor"), Weight(h, width, "tensor"), *biases)


def _moe_weights(shape: ModelShape) -> tuple[Weight, ...]:
    h, experts = shape.hidden_size, shape.experts
    assert experts is not None
    gates, width, shared = 2 if shape.gated else 1, experts.ffn_hidden_size, experts.shared_ffn_hidden_size
    return (
        *_norm(shape, h),
        Weight(experts.num_experts, h, "none"),
        Weight(gates * width, h, "expert", experts.num_experts),
        Weight(h, width, "expert", experts.num_experts),
        *((Weight(gates * shared, h, "tensor"), Weight(h, shared, "tensor")) if shared else ()),
    )


def _norm(shape: ModelShape, width: int) -> tuple[Weight, ...]:
    return (Weight(width, 1, "none"),) * (2 if shape.norm_bias else 1)


_ALIGNMENT = 64
"""megatron-core starts each parameter of a distributed optimizer's buffer at a multiple of so many elements."""


def local_elements(weight: Weight, layout: Layout) -> int:
    """Elements of one copy that a rank holds."""
    elements = weight.rows * weight.columns
    if weight.split == "none":
        return elements
    return elements // (layout.tensor_parallel_size if weight.split == "tensor" else layout.expert_tensor_parallel_size)


def rank_parameters(weights: Iterable[Weight], layout: Layout) -> RankParameters:
    """What one rank holds of these matrices; the ends of buffers are not padded yet (`padded_buffer`)."""
    dense = expert = aligned_dense = aligned_expert = 0
    for weight in weights:
        elements = local_elements(weight, layout)
        if weight.split == "expert":
            copies = weight.copies // layout.expert_parallel_size
            expert += elements * copies
            aligned_expert += _align(elements, _ALIGNMENT) * copies
        else:
            dense += elements * weight.copies
            aligned_dense += _align(elements, _ALIGNMENT) * weight.copies
    return RankParameters(dense, expert, aligned_dense, aligned_expert)


def padded_buffer(aligned_elements: int, num_shards: int) -> int:
    """Elements of one gradient buffer: its end is padded so that the shards of the distributed optimizer are equal."""
    return _align(aligned_elements, lcm(num_shards, 128))


def _align(elements: int, multiple: int) -> int:
    return -(-elements // multiple) * multiple
