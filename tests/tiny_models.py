"""Tiny random HF directories of each family, made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
FAMILIES: dict[str, Any] = {
    "llama": lambda **sizes: transformers.LlamaConfig(tie_word_embeddings=False, **sizes),
    "llama3_tied": lambda **sizes: transformers.LlamaConfig(tie_word_embeddings=True, rope_parameters=LLAMA3_ROPE, **sizes),
    "qwen2": lambda **sizes: transformers.Qwen2Config(tie_word_embeddings=True, **sizes),
    "qwen3": lambda **sizes: transformers.Qwen3Config(tie_word_embeddings=False, head_dim=16, **sizes),
}
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 101,
    "max_position_embeddings": 128,
}
_LATENT = {"kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12, "num_key_value_heads": 8}
_DEEPSEEK_EXPERTS = {"moe_intermediate_size": 32, "n_routed_experts": 8, "num_experts_per_tok": 3, "first_k_dense_replace": 1}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
    "original_max_position_embeddings": 16,
}
MOE_FAMILIES: dict[str, Any] = {
    "qwen3_moe": lambda **sizes: transformers.Qwen3MoeConfig(
        **{"head_dim": 16, "moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True}
        | sizes
    ),
    "qwen3_moe_some_dense": lambda **sizes: transformers.Qwen3MoeConfig(
        **{"head_dim": 16, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": False}
        | {"mlp_only_layers": [1], "tie_word_embeddings": True}
        | sizes
    ),
    "mixtral": lambda **sizes: transformers.MixtralConfig(num_local_experts=4, num_experts_per_tok=2, **sizes),
    "deepseek_v2": lambda **sizes: transformers.DeepseekV2Config(
        **sizes | _LATENT | _DEEPSEEK_EXPERTS, q_lora_rank=None, n_shared_experts=2, routed_scaling_factor=1.5
    ),
    "deepseek_v3": lambda **sizes: transformers.DeepseekV3Config(
        **sizes | _LATENT | _DEEPSEEK_EXPERTS | {"n_routed_experts": 16, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2},
        q_lora_rank=24,
        rope_parameters=YARN,
    ),
    "moonlight": lambda **sizes: transformers.DeepseekV3Config(
        **sizes | _LATENT | _DEEPSEEK_EXPERTS, q_lora_rank=None, n_group=1, topk_group=1, rms_norm_eps=1e-5, n_shared_experts=2
    ),
}
"""`deepseek_v3` has YaRN whose magnitudes show; `moonlight` is of the same type with other choices."""


def make_hf_model(directory: Path, family: str, **sizes: Any) -> Path:
    """Save a random fp32 model; norms and biases are random too, so that a swapped one shows."""
    config = (FAMILIES | MOE_FAMILIES)[family](**{**SIZES, **sizes})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.normal_(std=0.3 if "embed" in name or "mlp.gate." in name else 0.08)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.1)
    model.save_pretrained(directory)
    return directory
