"""Qwen3 dense: Llama's tensors and a norm over each query and key head."""

from dapo_megatron.weights.families.dense import DENSE_DECODER, Family

QWEN3 = Family(
    model_type="qwen3",
    table=DENSE_DECODER
    + """
decoder.layers.{L}.self_attention.q_layernorm.weight model.layers.{L}.self_attn.q_norm.weight d
decoder.layers.{L}.self_attention.k_layernorm.weight model.layers.{L}.self_attn.k_norm.weight d
""",
    defaults={"num_key_value_heads": 32, "head_dim": 128, "tie_word_embeddings": False},
    must_be_off=("attention_bias",),
)
