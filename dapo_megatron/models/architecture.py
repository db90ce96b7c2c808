"""What an HF config.json says about a decoder, as one record. Sizes are those of the mapping tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dapo_megatron.weights.families import with_defaults
from dapo_megatron.weights.families.dense import dense_sizes


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Frequency scaling of Llama 3.1 (`rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True)
class Architecture:
    """A dense decoder of the Llama family (Llama, Qwen2, Qwen3)."""

    model_type: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    rope_theta: float
    rope_scaling: Llama3Scaling | None

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> Architecture:
        """Read a config.json that `config.checks` has accepted (family, activation and rope type are known)."""
        # transformers 5 writes `rope_parameters`; older files have `rope_theta` and `rope_scaling` at the top.
        rope = {"rope_theta": hf.get("rope_theta"), **(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
        rope_type = rope.get("rope_type") or rope.get("type") or "default"
        sizes = dense_sizes(with_defaults(hf))
        return cls(
            model_type=hf["model_type"],
            num_layers=sizes["L"],
            hidden_size=sizes["h"],
            ffn_hidden_size=sizes["f"],
            num_attention_heads=sizes["g"] * sizes["n"],
            num_query_groups=sizes["g"],
            head_dim=sizes["d"],
            vocab_size=sizes["v"],
            rms_norm_eps=hf.get("rms_norm_eps", 1e-6),
            max_position_embeddings=hf["max_position_embeddings"],
            tie_word_embeddings=hf.get("tie_word_embeddings", False),
            qkv_bias=hf["model_type"] == "qwen2",
            qk_norm=hf["model_type"] == "qwen3",
            rope_theta=float(rope.get("rope_theta") or 10000.0),
            rope_scaling=Llama3Scaling(
                factor=rope["factor"],
                low_freq_factor=rope["low_freq_factor"],
                high_freq_factor=rope["high_freq_factor"],
                original_max_position_embeddings=rope["original_max_position_embeddings"],
            )
            if rope_type == "llama3"
            else None,
        )

    def padded_query_groups(self, tensor_parallel_size: int) -> int:
        """Query groups after padding with all-zero groups so that tensor parallelism divides them.

        A zero group has zero output and zero gradient, so it never changes: 3 groups train on 2 ranks as 4.
        """
        return -(-self.num_query_groups // tensor_parallel_size) * tensor_parallel_size

    def padded_vocab_size(self, tensor_parallel_size: int) -> int:
        """Vocabulary rows after padding to a multiple of the tensor-parallel size; the loss never sees the padding."""
        return -(-self.vocab_size // tensor_parallel_size) * tensor_parallel_size
