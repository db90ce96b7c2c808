"""Qwen2 and Qwen2.5: Llama's tensors and a bias on q, k and v (fixed by the architecture, no config field)."""

from dapo_megatron.weights.families.dense import DENSE_DECODER, Family

QWEN2 = Family(
    model_type="qwen2",
    table=DENSE_DECODER
    + """
decoder.layers.{L}.self_attention.linear_qkv.bias model.layers.{L}.self_attn.{q,k,v}_proj.bias (g [q:n*d | k:d | v:d])+pad
""",
    defaults={"num_key_value_heads": 32, "head_dim": None, "tie_word_embeddings": False},
)
