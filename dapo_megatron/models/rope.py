"""Rotary embedding as HF defines it, for packed sequences."""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from dapo_megatron.models.architecture import Architecture, Llama3Scaling
from dapo_megatron.models.packed import PackedSequences


def inverse_frequencies(architecture: Architecture) -> Tensor:
    """fp32 [head_dim / 2], with the Llama 3 scaling where the config asks for it.

    megatron-core 0.19.2 takes only `factor` of the four Llama 3 parameters.
    """
    exponents = torch.arange(0, architecture.head_dim, 2, dtype=torch.float32) / architecture.head_dim
    frequencies = 1.0 / architecture.rope_theta**exponents
    scaling = architecture.rope_scaling
    return frequencies if scaling is None else _llama3_scaled(frequencies, scaling)


def _llama3_scaled(frequencies: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Long wavelengths are divided by `factor`, short ones kept, those between interpolated."""
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0, 1)
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
