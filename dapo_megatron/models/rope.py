"""Rotary embedding as HF defines it, for packed sequences."""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch import Tensor

from dapo_megatron.models.architecture import Architecture, Llama3Scaling, YarnScaling
from dapo_megatron.models.packed import PackedSequences


def inverse_frequencies(architecture: Architecture) -> Tensor:
    """fp32 [head_dim / 2], with the scaling of Llama 3 or YaRN where the config asks for it.

    megatron-core 0.19.2 takes only `factor` of the four Llama 3 parameters.
    """
    exponents = torch.arange(0, architecture.head_dim, 2, dtype=torch.float32) / architecture.head_dim
    frequencies = 1.0 / architecture.rope_theta**exponents
    scaling = architecture.rope_scaling
    if isinstance(scaling, Llama3Scaling):
        return _llama3_scaled(frequencies, scaling)
    if isinstance(scaling, YarnScaling):
        return _yarn_scaled(frequencies, scaling, architecture)
    return frequencies


def _llama3_scaled(frequencies: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Long wavelengths are divided by `factor`, short ones kept, those between interpolated."""
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor


def _yarn_scaled(frequencies: Tensor, scaling: YarnScaling, architecture: Architecture) -> Tensor:
    """Dimensions that turn often in the original context are kept, those that turn seldom divided by `factor`, a ramp between."""

    def dimension(num_turns: float) -> float:
        wavelength = scaling.original_max_position_embeddings / (num_turns * 2 * math.pi)
        return architecture.head_dim * math.log(wavelength) / (2 * math.log(architecture.rope_theta))

    first = max(math.floor(dimension(scaling.beta_fast)), 0)
    last = min(math.ceil(dimension(scaling.beta_slow)), architecture.head_dim - 1)
    ramp = (torch.arange(len(frequencies), dtype=torch.float32) - first) / max(last - first, 1e-3)
    kept = 1 - ramp.clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor


class _PackedRotaryEmbedding(RotaryEmbedding):
    """Of packed tokens, each by its own position."""

    def __init__(self, architecture: Architecture, config: TransformerConfig) -> None:
        super().__init__(
            kv_channels=architecture.head_dim, rotary_percent=1.0, use_cpu_initialization=config.use_cpu_initialization
        )
        self.inv_freq = inverse_frequencies(architecture)

    def get_rotary_seq_len(
        self,
        inference_context: Any,
        transformer: Any,
        transformer_input: Any,
        transformer_config: Any,
        packed_seq_params: PackedSeqParams,
        **_: object,
    ) -> PackedSequences:
        """The pack instead of a length; megatron-core hands it to `forward`, and the result of that to the layers."""
        assert isinstance(packed_seq_params, PackedSequences)
        return packed_seq_params

    def angles(self, pack: PackedSequences) -> Tensor:
        """[T, head_dim / 2]."""
        assert pack.positions is not None
        return pack.positions.to(self.inv_freq.dtype)[:, None] * self.inv_freq.to(pack.positions.device)


class PackedRotaryEmbedding(_PackedRotaryEmbedding):
    """Notes the rotation in the pack for `PackedSelfAttention`, which does it.

    megatron-core's own, without TransformerEngine, takes a dozen passes over queries and keys and works the angles out in each layer.
    """

    def __init__(self, architecture: Architecture, config: TransformerConfig) -> None:
        super().__init__(architecture, config)
        self._dtype = config.params_dtype

    def forward(self, pack: PackedSequences, **_: object) -> None:
        """No angles: megatron-core then rotates nothing."""
        if pack.rotation is None:
            angles = self.angles(pack)[:, None, None, :]
            pack.rotation = (angles.cos().to(self._dtype), angles.sin().to(self._dtype))


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """x [T, 1, heads, head_dim], its halves (a, b) as (a cos - b sin, b cos + a sin); cosine and sine [T, 1, 1, head_dim / 2].

    All of one dtype.
    """
    return _Rotation.apply(x, cosine, sine)


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        return _rotated(x, cosine, sine, sign=1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cosine, sine = ctx.saved_tensors
        return _rotated(grads[0], cosine, sine, sign=-1), None, None


def _rotated(x: Tensor, cosine: Tensor, sine: Tensor, sign: int) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    first, second = out.chunk(2, dim=-1)
    torch.mul(a, cosine, out=first).addcmul_(b, sine, value=-sign)
    torch.mul(b, cosine, out=second).addcmul_(a, sine, value=sign)
    return out


class PackedLatentRotaryEmbedding(_PackedRotaryEmbedding):
    """Gives the angles to megatron-core's latent attention."""

    def __init__(self, architecture: Architecture, config: MLATransformerConfig) -> None:
        super().__init__(architecture, config)
        scaling = architecture.rope_scaling
        self.magnitude = scaling.magnitude if isinstance(scaling, YarnScaling) else None

    def forward(self, pack: PackedSequences, **_: object) -> Any:
        """Angles [T, 1, head_dim]; under YaRN with the magnitude of the rotated vectors."""
        half = self.angles(pack)
        angles = torch.cat((half, half), dim=-1)[:, None, :]
        return angles if self.magnitude is None else (angles, self.magnitude)
