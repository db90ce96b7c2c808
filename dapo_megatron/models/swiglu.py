"""SwiGLU of the local layer spec: silu(gate) * up, keeping its input alone for the backward pass, which writes the gradient over it.

Shape letters: f hidden width of the MLP on this rank.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.backends import LocalSpecProvider
from torch import Tensor

_silu, _silu_backward = torch.ops.aten.silu.out, torch.ops.aten.silu_backward.grad_input


class SwiGLU(torch.nn.Module):
    """[..., gate f | up f] -> [..., f].

    megatron-core's own, without TransformerEngine, keeps twice as much, adds an offset of zero and joins the gradients of the halves by a copy.
    """

    def __init__(self, *, config: object) -> None:
        super().__init__()

    def forward(self, joined: Tensor, /) -> Tensor:
        """The same bits as `silu(gate) * up`, forward and backward.

        `joined` must have no other reader, as the first linear layer's output has none; autograd refuses a second backward pass.
        """
        return _SwiGLU.apply(joined)


class SwiGLUSpecProvider(LocalSpecProvider):
    """megatron-core's local modules with this activation, in dense layers and experts."""

    def activation_func(self) -> Any:
        """Builder of the module."""
        return SwiGLU


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, joined: Tensor) -> Tensor:
        ctx.save_for_backward(joined)
        gate, up = joined.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (joined,), (grad,) = ctx.saved_tensors, grads
        gate, up = joined.chunk(2, dim=-1)
        of_activation = grad * up
        _silu(gate, out=up).mul_(grad)
        _silu_backward(of_activation, gate, grad_input=gate)
        return joined.detach()
