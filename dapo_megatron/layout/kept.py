"""One tensor that lives from the forward pass until the backward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dapo_megatron.layout.layout import RecomputedPart

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
