"""What an HF config.json says about a decoder, as one record. Sizes are those of the mapping tables."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dapo_megatron.types import MappingError
from dapo_megatron.weights.families import family_of, megatron_arguments, with_defaults
from dapo_megatron.weights.families.rope import rope_parameters


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Frequency scaling of Llama 3.1 (`rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """Frequency scaling of DeepSeek (`rope_type: yarn`); `magnitude` multiplies the rotated vectors."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float
    magnitude: float


@dataclass(frozen=True, slots=True)
class Architecture:
    """A decoder of one of the families in `weights/families`, read through their config maps."""

    model_type: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    """Of what is rotated: under latent attention the rotary part of a head."""
    vocab_size: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    rope_theta: float
    rope_scaling: Llama3Scaling | YarnScaling | None
    experts: Mapping[str, Any] | None
    """Fields of megatron-core's TransformerConfig for layers with experts; None in a dense model."""
    latent_attention: Mapping[str, Any] | None
    """Fields of megatron-core's MLATransformerConfig; None with grouped-query attention."""

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> Architecture:
        """Read a config.json. MappingError for what megatron-core computes otherwise than the model was trained."""
        arguments, config = megatron_arguments(hf), with_defaults(hf, family_of(hf))
        _check_router(arguments, config)
        latent = _named(arguments, _LATENT_ATTENTION) if arguments.get("multi_latent_attention") else None
        experts = {name: value for name, value in arguments.items() if name.startswith("moe_")}
        return cls(
            model_type=hf["model_type"],
            num_layers=arguments["num_layers"],
            hidden_size=arguments["hidden_size"],
            ffn_hidden_size=arguments["ffn_hidden_size"],
            num_attention_heads=arguments["num_attention_heads"],
            num_query_groups=arguments.get("num_query_groups", arguments["num_attention_heads"]),
            head_dim=latent["qk_pos_emb_head_dim"] if latent else arguments["kv_channels"],
            vocab_size=arguments["vocab_size"],
            rms_norm_eps=arguments["layernorm_epsilon"],
            max_position_embeddings=arguments["max_position_embeddings"],
            tie_word_embeddings=not arguments["untie_embeddings_and_output_weights"],
            qkv_bias=arguments.get("add_qkv_bias", False),
            qk_norm=arguments["qk_layernorm"],
            rope_theta=float(arguments["rotary_base"]),
            rope_scaling=_rope_scaling(rope_parameters(config)),
            experts=experts | {"num_moe_experts": arguments["num_experts"]} if experts else None,
            latent_attention=latent,
        )

    def has_experts(self, layer: int) -> bool:
        """Whether the MLP of a layer, counted from 0 over the whole model, is a mixture of experts."""
        if self.experts is None:
            return False
        frequency = self.experts["moe_layer_freq"]
        return bool(frequency[layer]) if isinstance(frequency, list) else layer % frequency == 0

    def padded_query_groups(self, tensor_parallel_size: int) -> int:
        """Query groups after padding with all-zero groups so that tensor parallelism divides them.

        A zero group has zero output and zero gradient, so it never changes: 3 groups train on 2 ranks as 4.
        """
        return -(-self.num_query_groups // tensor_parallel_size) * tensor_parallel_size

    def padded_vocab_size(self, tensor_parallel_size: int) -> int:
        """Vocabulary rows after padding to a multiple of the tensor-parallel size; the loss never sees the padding."""
        return -(-self.vocab_size // tensor_parallel_size) * tensor_parallel_size


_LATENT_ATTENTION = (
    "q_lora_rank",
    "kv_lora_rank",
    "qk_head_dim",
    "qk_pos_emb_head_dim",
    "v_head_dim",
    "rope_type",
    "rotary_base",
    "rotary_scaling_factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
)


def _named(arguments: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: arguments[name] for name in names if name in arguments}


def _check_router(arguments: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Routers that megatron-core 0.19.2 cannot express: it would train another model without a word."""
    if arguments.get("moe_router_score_function") == "sigmoid" and not config["norm_topk_prob"]:
        raise MappingError("norm_topk_prob (false) must be true: megatron-core makes the scores of the chosen experts sum to 1")
    groups, experts_per_token = arguments.get("moe_router_group_topk"), arguments.get("moe_router_topk")
    if groups and config["n_group"] > 1 and experts_per_token // groups != 2:
        raise MappingError(
            f"num_experts_per_tok // topk_group ({experts_per_token} // {groups}) must be 2: megatron-core ranks groups by so many "
            "of their experts, DeepSeek-V3 by the best two; such a model can be converted, not trained"
        )
    if config.get("topk_method") == "group_limited_greedy":
        raise MappingError(
            "topk_method ('group_limited_greedy') must be 'greedy': megatron-core ranks groups by their best two experts, DeepSeek-V2 "
            "by the best one; such a model can be converted, not trained"
        )


def _rope_scaling(rope: Mapping[str, Any]) -> Llama3Scaling | YarnScaling | None:
    if rope["rope_type"] == "llama3":
        return Llama3Scaling(
            factor=rope["factor"],
            low_freq_factor=rope["low_freq_factor"],
            high_freq_factor=rope["high_freq_factor"],
            original_max_position_embeddings=rope["original_max_position_embeddings"],
        )
    if rope["rope_type"] == "yarn":
        return YarnScaling(
            factor=rope["factor"],
            original_max_position_embeddings=rope["original_max_position_embeddings"],
            beta_fast=rope.get("beta_fast") or 32,
            beta_slow=rope.get("beta_slow") or 1,
            magnitude=_magnitude(rope["factor"], rope.get("mscale") or 1)
            / _magnitude(rope["factor"], rope.get("mscale_all_dim") or 0),
        )
    return None


def _magnitude(factor: float, mscale: float) -> float:
    """What keeps the entropy of attention over a context that is `factor` times longer (YaRN)."""
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0
