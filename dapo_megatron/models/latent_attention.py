"""Multi-head latent attention of the local layer spec (DeepSeek)."""

from __future__ import annotations

from typing import Any

from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from torch import Tensor, cat, split


class PackedLatentAttention(MLASelfAttention):
    """megatron-core's, mended in two places of 0.19.2.

    Without TransformerEngine the down projection is column-parallel: its output is gathered, and the rotary part then feeds each
    rank's heads with no reduction of its gradient behind it. And a model without a query latent (`q_lora_rank` null) would get a
    second norm in front of its query projection, which no published model has.
    """

    def _resolve_qk_norm_config(self, submodules: MLASelfAttentionSubmodules) -> dict[str, Any]:
        """Build what the layer spec names."""
        names = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm")
        return {name: getattr(submodules, name) for name in names}

    def _qkv_down_projection(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        query, latent_and_key = super()._qkv_down_projection(hidden_states)
        config = self.config
        widths = [config.kv_lora_rank, config.qk_pos_emb_head_dim]
        if latent_and_key.size(-1) == sum(widths):
            return query, latent_and_key
        latent_and_key = gather_from_tensor_model_parallel_region(latent_and_key)
        if config.sequence_parallel:  # the caller gathers the rotary part again, and that gather sums gradients
            return query, scatter_to_sequence_parallel_region(latent_and_key)
        latent, key = split(latent_and_key, widths, dim=-1)
        return query, cat([latent, copy_to_tensor_model_parallel_region(key)], dim=-1)
