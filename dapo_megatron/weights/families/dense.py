"""What decoder families with grouped-query attention share: tensors, size symbols, the config map, names of norms."""

from __future__ import annotations

from dapo_megatron.types import MappingError
from dapo_megatron.weights.families.family import Arguments, Config, positive
from dapo_megatron.weights.families.rope import rope_arguments

DECODER = """
embedding.word_embeddings.weight model.embed_tokens.weight v+pad h
decoder.layers.{L}.input_layernorm.weight model.layers.{L}.input_layernorm.weight h
decoder.layers.{L}.pre_mlp_layernorm.weight model.layers.{L}.post_attention_layernorm.weight h
decoder.final_layernorm.weight model.norm.weight h
output_layer.weight lm_head.weight v+pad h if not tie_word_embeddings
"""

GROUPED_QUERY_ATTENTION = """
decoder.layers.{L}.self_attention.linear_qkv.weight model.layers.{L}.self_attn.{q,k,v}_proj.weight (g [q:n*d | k:d | v:d])+pad h
decoder.layers.{L}.self_attention.linear_proj.weight model.layers.{L}.self_attn.o_proj.weight h g*n*d+pad
"""

QK_NORM = """
decoder.layers.{L}.self_attention.q_layernorm.weight model.layers.{L}.self_attn.q_norm.weight d
decoder.layers.{L}.self_attention.k_layernorm.weight model.layers.{L}.self_attn.k_norm.weight d
"""

DENSE_MLP = """
decoder.layers.{D}.mlp.linear_fc1.weight model.layers.{D}.mlp.{gate,up}_proj.weight [gate:f | up:f] h
decoder.layers.{D}.mlp.linear_fc2.weight model.layers.{D}.mlp.down_proj.weight h f
"""

DENSE_DECODER = DECODER + GROUPED_QUERY_ATTENTION + DENSE_MLP

NORM_ALIASES = {
    ".self_attention.linear_qkv.layer_norm_weight": ".input_layernorm.weight",
    ".mlp.linear_fc1.layer_norm_weight": ".pre_mlp_layernorm.weight",
}
"""Name ending in the TransformerEngine layer spec (norm fused into the linear) -> ending used in the tables."""


def dense_sizes(config: Config) -> dict[str, int]:
    """The size symbols of the tables above.

    L layers (D those with a dense MLP: all), h hidden, v vocabulary (unpadded), f MLP width, d head width, g key/value heads
    (query groups), n query heads per group.
    """
    num_heads = positive(config, "num_attention_heads")
    num_groups = num_heads if config.get("num_key_value_heads") is None else positive(config, "num_key_value_heads")
    hidden_size = positive(config, "hidden_size")
    head_dim = hidden_size // num_heads if config.get("head_dim") is None else positive(config, "head_dim")
    if num_heads % num_groups:
        raise MappingError(
            f"num_key_value_heads ({num_groups}) must divide num_attention_heads ({num_heads}); correct config.json"
        )
    num_layers = positive(config, "num_hidden_layers")
    return {
        "L": num_layers,
        "D": num_layers,
        "h": hidden_size,
        "v": positive(config, "vocab_size"),
        "f": positive(config, "intermediate_size"),
        "d": head_dim,
        "g": num_groups,
        "n": num_heads // num_groups,
    }


def decoder_arguments(config: Config) -> Arguments:
    """What every family here has: RMSNorm, SwiGLU, no biases, rotary positions."""
    return {
        "num_layers": positive(config, "num_hidden_layers"),
        "hidden_size": positive(config, "hidden_size"),
        "ffn_hidden_size": positive(config, "intermediate_size"),
        "num_attention_heads": positive(config, "num_attention_heads"),
        "vocab_size": positive(config, "vocab_size"),
        "max_position_embeddings": positive(config, "max_position_embeddings"),
        "untie_embeddings_and_output_weights": not config["tie_word_embeddings"],
        "normalization": "RMSNorm",
        "layernorm_epsilon": config["rms_norm_eps"],
        "swiglu": True,
        "add_bias_linear": False,
        **rope_arguments(config),
    }


def dense_arguments(config: Config) -> Arguments:
    """The config map of a decoder with grouped-query attention."""
    sizes = dense_sizes(config)
    return decoder_arguments(config) | {
        "group_query_attention": True,
        "num_query_groups": sizes["g"],
        "kv_channels": sizes["d"],
        "add_qkv_bias": False,
        "qk_layernorm": False,
    }
