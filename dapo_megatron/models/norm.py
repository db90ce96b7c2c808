"""RMSNorm of the local layer spec. Shape letters: T packed tokens, h width."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class SequenceParallelRMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm, marked for megatron-core: under sequence parallelism its gradient is summed over tensor-parallel ranks.

    megatron-core's WrappedTorchNorm refuses sequence parallelism.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., h]. torch has one kernel for it on CUDA; on CPU it is a dozen operations and keeps three tensors."""
        if x.is_cuda or x.dtype != torch.float32:
            return super().forward(x)
        return _RMSNorm.apply(x, self.weight, self.eps)


class LatentRMSNorm(SequenceParallelRMSNorm):
    """DeepSeek's norm of a latent: its epsilon is 1e-6 whatever `rms_norm_eps` says (Moonlight: 1e-5)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: object):
        super().__init__(config, hidden_size, eps=1e-6)


class _RMSNorm(torch.autograd.Function):
    """y = x r w with r = (mean x^2 + eps)^-1/2, to torch's bits; keeps x and r."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = x.square().mean(dim=-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (x, weight, scale), (grad,) = ctx.saved_tensors, grads
        product = (grad * x).reshape(-1, x.shape[-1])
        along = (product @ weight).view(scale.shape).mul_(scale**3).div_(-x.shape[-1])
        grad_x = (grad * weight).mul_(scale).addcmul_(x, along)
        return grad_x, scale.reshape(-1) @ product, None
