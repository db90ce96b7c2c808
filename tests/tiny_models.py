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


def make_hf_model(directory: Path, family: str, **sizes: Any) -> Path:
    """Save a random fp32 model; norms and biases are random too, so that a swapped one shows."""
    defaults = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 101,
        "max_position_embeddings": 128,
    }
    config = FAMILIES[family](**{**defaults, **sizes})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.normal_(std=0.3 if "embed" in name else 0.08)
    model.save_pretrained(directory)
    return directory
