"""What a layer keeps of a forward pass for its backward pass, in bytes per token, and what either needs for a moment.

Letters as in megatron-core: h hidden, a heads, g groups, d head width, f MLP width, E experts, k experts per token. All kept tensors
are listed one by one with what the layer does with them; nothing here is measured or fitted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from dapo_megatron.layout import kept_local, kept_transformer_engine
from dapo_megatron.layout.kept import Extent, Kept
from dapo_megatron.layout.layout import Layout, RecomputedPart
from dapo_megatron.layout.memory_records import Kernels, MemoryOptions
from dapo_megatron.layout.model_shape import ModelShape


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
        options.precision.linear_input_bytes,
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
    linear_width: float | None,
) -> LayerActivations:
    per_token = shape.experts.num_per_token if shape.experts else 0
    sequence = 1 / tensor_parallel_size if sequence_parallel else 1.0
    cut = _Cut(
        sequence=sequence,
        tensor=1 / tensor_parallel_size,
        routed=sequence * per_token * expert_imbalance * expert_tensor_parallel_size,
        routed_tensor=sequence * per_token * expert_imbalance,
    )
    if kernels == "transformer_engine":
        kept = kept_transformer_engine.layer_tensors(shape, has_experts, dropout, score_tokens, width, linear_width)
    else:
        kept = kept_local.layer_tensors(shape, has_experts, score_tokens, width)
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
def _transient(shape: ModelShape, has_experts: bool, cut: _Cut, width: int, *, gathered: bool) -> float:
    """Backward of the second projection (its gathered gradient, its input's gradient) or of the activation function."""
    gates, h = 2 if shape.gated else 1, width * shape.hidden_size
    if not has_experts:
        f = width * shape.ffn_hidden_size * cut.tensor
        return max(h * cut.sequence + (h if gathered else 0) + f, h * cut.sequence + gates * f)
    assert shape.experts is not None
    f, routed = width * shape.experts.ffn_hidden_size * cut.routed_tensor, h * cut.routed
    return h * cut.sequence + routed + gates * f
