"""Rotary embedding as HF defines it, for packed sequences."""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import MLATransformerConfig
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


class PackedRotaryEmbedding(RotaryEmbedding):
    """Looks angles up by each packed token's own position, so one call rotates the whole pack."""

    def get_rotary_seq_len(
        self,
        inference_context: Any,
        transformer: Any,
        transformer_input: Any,
        transformer_config: Any,
        packed_seq_params: PackedSeqParams,
        **_: object,
    ) -> Tensor:
        """Positions [T] instead of a length; GPTModel hands them to `forward`."""
        assert isinstance(packed_seq_params, PackedSequences) and packed_seq_params.positions is not None
        return packed_seq_params.positions

    def forward(self, positions: Tensor, **_: object) -> Tensor:
        """Angles [T, 1, 1, head_dim]."""
        half = positions.to(self.inv_freq.dtype)[:, None] * self.inv_freq.to(positions.device)
        return torch.cat((half, half), dim=-1)[:, None, None, :]


class PackedLatentRotaryEmbedding(PackedRotaryEmbedding):
    """As `PackedRotaryEmbedding` inside megatron-core's latent attention, which drops the batch axis of packed sequences."""

    def __init__(self, architecture: Architecture, config: MLATransformerConfig) -> None:
        super().__init__(
            kv_channels=architecture.head_dim, rotary_percent=1.0, use_cpu_initialization=config.use_cpu_initialization
        )
        scaling = architecture.rope_scaling
        self.magnitude = scaling.magnitude if isinstance(scaling, YarnScaling) else None
        self.inv_freq = inverse_frequencies(architecture)

    def forward(self, positions: Tensor, **_: object) -> Any:
        """Angles [T, 1, head_dim]; under YaRN with the magnitude of the rotated vectors."""
        angles = super().forward(positions).squeeze(1)
        return angles if self.magnitude is None else (angles, self.magnitude)
