"""Qwen3 dense: Llama's tensors and a norm over each query and key head."""

from dapo_megatron.weights.families.dense import DENSE_DECODER, NORM_ALIASES, QK_NORM, dense_arguments, dense_sizes
from dapo_megatron.weights.families.family import Family

QWEN3 = Family(
    model_type="qwen3",
    table=DENSE_DECODER + QK_NORM,
    sizes=dense_sizes,
    arguments=lambda config: dense_arguments(config) | {"qk_layernorm": True},
    defaults={"num_key_value_heads": 32, "head_dim": 128, "tie_word_embeddings": False, "rms_norm_eps": 1e-6},
    must_be_off=("attention_bias",),
    aliases=NORM_ALIASES,
)
