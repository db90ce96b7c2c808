"""Qwen3 mixture of experts (30B-A3B, 235B-A22B): Qwen3's attention; layers without experts where config.json says so."""

from dapo_megatron.weights.families.dense import (
    DECODER,
    DENSE_MLP,
    GROUPED_QUERY_ATTENTION,
    NORM_ALIASES,
    QK_NORM,
    dense_arguments,
    dense_sizes,
)
from dapo_megatron.weights.families.family import Arguments, Config, Family, positive
from dapo_megatron.weights.families.moe import EXPERTS, dense_and_moe_layers, moe_arguments


def _is_moe(config: Config) -> list[bool]:
    step, dense = positive(config, "decoder_sparse_step"), config["mlp_only_layers"]
    return [layer not in dense and (layer + 1) % step == 0 for layer in range(positive(config, "num_hidden_layers"))]


def _sizes(config: Config) -> dict[str, int]:
    return dense_sizes(config) | {"E": positive(config, "num_experts"), "m": positive(config, "moe_intermediate_size")}


def _arguments(config: Config) -> Arguments:
    sizes = _sizes(config)
    experts = moe_arguments(config, num_experts=sizes["E"], expert_width=sizes["m"], is_moe=_is_moe(config))
    # Scores that do not sum to 1 are the softmax over all experts, taken before the choice.
    softmax_first = {"moe_router_pre_softmax": not config["norm_topk_prob"]}
    return dense_arguments(config) | experts | {"qk_layernorm": True} | softmax_first


QWEN3_MOE = Family(
    model_type="qwen3_moe",
    table=DECODER + GROUPED_QUERY_ATTENTION + QK_NORM + DENSE_MLP + EXPERTS,
    sizes=_sizes,
    arguments=_arguments,
    defaults={
        "num_key_value_heads": 4,
        "head_dim": None,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-6,
        "decoder_sparse_step": 1,
        "mlp_only_layers": (),
        "norm_topk_prob": False,
    },
    must_be_off=("attention_bias",),
    aliases=NORM_ALIASES,
    layers=lambda config: dense_and_moe_layers(_is_moe(config)),
    renamed_fields={"num_local_experts": "num_experts"},
)
