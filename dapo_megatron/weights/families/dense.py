"""What the dense decoder families share: tensors, the meaning of the size symbols, TransformerEngine's names of norms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dapo_megatron.types import MappingError

DENSE_DECODER = """
embedding.word_embeddings.weight model.embed_tokens.weight v+pad h
decoder.layers.{L}.input_layernorm.weight model.layers.{L}.input_layernorm.weight h
decoder.layers.{L}.self_attention.linear_qkv.weight model.layers.{L}.self_attn.{q,k,v}_proj.weight (g [q:n*d | k:d | v:d])+pad h
decoder.layers.{L}.self_attention.linear_proj.weight model.layers.{L}.self_attn.o_proj.weight h g*n*d+pad
decoder.layers.{L}.pre_mlp_layernorm.weight model.layers.{L}.post_attention_layernorm.weight h
decoder.layers.{L}.mlp.linear_fc1.weight model.layers.{L}.mlp.{gate,up}_proj.weight [gate:f | up:f] h
decoder.layers.{L}.mlp.linear_fc2.weight model.layers.{L}.mlp.down_proj.weight h f
decoder.final_layernorm.weight model.norm.weight h
output_layer.weight lm_head.weight v+pad h if not tie_word_embeddings
"""

NORM_ALIASES = {
    ".self_attention.linear_qkv.layer_norm_weight": ".input_layernorm.weight",
    ".mlp.linear_fc1.layer_norm_weight": ".pre_mlp_layernorm.weight",
}
"""Name ending in the TransformerEngine layer spec (norm fused into the linear) -> ending used in the tables."""


def dense_sizes(config: Mapping[str, Any]) -> dict[str, int]:
    """The size symbols of the dense tables.

    L layers, h hidden, v vocabulary (unpadded), f MLP width, d head width, g key/value heads (query groups), n query heads per
    group.
    """
    num_heads = _positive(config, "num_attention_heads")
    num_groups = num_heads if config.get("num_key_value_heads") is None else _positive(config, "num_key_value_heads")
    hidden_size = _positive(config, "hidden_size")
    head_dim = hidden_size // num_heads if config.get("head_dim") is None else _positive(config, "head_dim")
    if num_heads % num_groups:
        raise MappingError(
            f"num_key_value_heads ({num_groups}) must divide num_attention_heads ({num_heads}); correct config.json"
        )
    return {
        "L": _positive(config, "num_hidden_layers"),
        "h": hidden_size,
        "v": _positive(config, "vocab_size"),
        "f": _positive(config, "intermediate_size"),
        "d": head_dim,
        "g": num_groups,
        "n": num_heads // num_groups,
    }


def _positive(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise MappingError(f"{name} ({value!r}) must be a positive integer; set it in config.json")
    return value


@dataclass(frozen=True, slots=True)
class Family:
    """One HF model type: its table and what to know about its config.json."""

    model_type: str
    table: str
    """Lines of the mapping language, `layout.py`."""
    defaults: Mapping[str, Any]
    """HF config fields that may be missing or null, and the value transformers assumes. None: derived by `dense_sizes`."""
    must_be_off: tuple[str, ...] = ()
    """Boolean HF config fields that add tensors the table does not have."""
    sizes: Callable[[Mapping[str, Any]], dict[str, int]] = dense_sizes
    """HF config, defaults filled in -> the numbers behind the table's symbols and index letters."""
    aliases: Mapping[str, str] = field(default_factory=lambda: NORM_ALIASES)
    """Ending of another megatron-core name for a tensor -> ending used in the table."""
