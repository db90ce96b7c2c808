"""Mixtral: Llama's attention, experts in every layer, HF names of its own."""

from dapo_megatron.weights.families.dense import (
    DECODER,
    GROUPED_QUERY_ATTENTION,
    NORM_ALIASES,
    dense_arguments,
    dense_sizes,
)
from dapo_megatron.weights.families.family import Arguments, Config, Family, positive
from dapo_megatron.weights.families.moe import moe_arguments

_EXPERTS = """
decoder.layers.{L}.mlp.router.weight model.layers.{L}.block_sparse_moe.gate.weight E h
decoder.layers.{L}.mlp.experts.experts.{E}.linear_fc1.weight model.layers.{L}.block_sparse_moe.experts.{E}.{w1,w3}.weight [w1:f | w3:f] h
decoder.layers.{L}.mlp.experts.experts.{E}.linear_fc2.weight model.layers.{L}.block_sparse_moe.experts.{E}.w2.weight h f
"""


def _sizes(config: Config) -> dict[str, int]:
    return dense_sizes(config) | {"E": positive(config, "num_local_experts")}


def _arguments(config: Config) -> Arguments:
    sizes = _sizes(config)
    everywhere = [True] * sizes["L"]
    return dense_arguments(config) | moe_arguments(config, num_experts=sizes["E"], expert_width=sizes["f"], is_moe=everywhere)


MIXTRAL = Family(
    model_type="mixtral",
    table=DECODER + GROUPED_QUERY_ATTENTION + _EXPERTS,
    sizes=_sizes,
    arguments=_arguments,
    defaults={
        "num_key_value_heads": 8,
        "head_dim": None,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5,
        "num_experts_per_tok": 2,
        "num_local_experts": 8,
    },
    aliases=NORM_ALIASES,
    renamed_fields={"num_experts": "num_local_experts"},
)
