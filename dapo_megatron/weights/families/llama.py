"""Llama 2 and 3, and models of the same architecture (SmolLM2): `model_type: llama`."""

from dapo_megatron.weights.families.dense import DENSE_DECODER, NORM_ALIASES, dense_arguments, dense_sizes
from dapo_megatron.weights.families.family import Family

LLAMA = Family(
    model_type="llama",
    table=DENSE_DECODER,
    sizes=dense_sizes,
    arguments=dense_arguments,
    defaults={"num_key_value_heads": None, "head_dim": None, "tie_word_embeddings": False, "rms_norm_eps": 1e-6},
    must_be_off=("attention_bias", "mlp_bias"),
    aliases=NORM_ALIASES,
)
