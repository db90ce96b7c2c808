"""Llama 2 and 3, and models of the same architecture (SmolLM2): `model_type: llama`."""

from dapo_megatron.weights.families.dense import DENSE_DECODER, Family

LLAMA = Family(
    model_type="llama",
    table=DENSE_DECODER,
    defaults={"num_key_value_heads": None, "head_dim": None, "tie_word_embeddings": False},
    must_be_off=("attention_bias", "mlp_bias"),
)
