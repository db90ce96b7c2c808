"""Qwen2 and Qwen2.5: Llama's tensors and a bias on q, k and v (fixed by the architecture, no config field)."""

from dapo_megatron.weights.families.dense import DENSE_DECODER, NORM_ALIASES, dense_arguments, dense_sizes
from dapo_megatron.weights.families.family import Family

QWEN2 = Family(
    model_type="qwen2",
    table=DENSE_DECODER
    + """
decoder.layers.{L}.self_attention.linear_qkv.bias model.layers.{L}.self_attn.{q,k,v}_proj.bias (g [q:n*d | k:d | v:d])+pad
""",
    sizes=dense_sizes,
    arguments=lambda config: dense_arguments(config) | {"add_qkv_bias": True},
    defaults={"num_key_value_heads": 32, "head_dim": None, "tie_word_embeddings": False, "rms_norm_eps": 1e-6},
    aliases=NORM_ALIASES,
)
