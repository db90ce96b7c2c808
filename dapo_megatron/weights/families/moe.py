"""Mixture-of-experts layers: tensors, which layers have them, and their part of the config map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dapo_megatron.weights.families.family import Arguments, Config, positive

EXPERTS = """
decoder.layers.{M}.mlp.router.weight model.layers.{M}.mlp.gate.weight E h
decoder.layers.{M}.mlp.experts.experts.{E}.linear_fc1.weight model.layers.{M}.mlp.experts.{E}.{gate,up}_proj.weight [gate:m | up:m] h
decoder.layers.{M}.mlp.experts.experts.{E}.linear_fc2.weight model.layers.{M}.mlp.experts.{E}.down_proj.weight h m
"""
"""M: layers with experts, E: experts of a layer, m: width of an expert."""


def dense_and_moe_layers(is_moe: Sequence[bool]) -> Mapping[str, Sequence[int]]:
    """The letters D (dense MLP) and M (experts), from one flag per layer."""
    return {
        "D": [layer for layer, moe in enumerate(is_moe) if not moe],
        "M": [layer for layer, moe in enumerate(is_moe) if moe],
    }


def moe_arguments(config: Config, *, num_experts: int, expert_width: int, is_moe: Sequence[bool]) -> Arguments:
    """Experts and router as the checkpoint was trained, softmax scores; no auxiliary loss and no token is dropped.

    `moe_layer_freq` is 1 where every layer has experts: a list makes megatron-core name the layers of a checkpoint one by one.
    """
    return {
        "num_experts": num_experts,
        "moe_ffn_hidden_size": expert_width,
        "moe_router_topk": positive(config, "num_experts_per_tok"),
        "moe_layer_freq": 1 if all(is_moe) else [int(moe) for moe in is_moe],
        "moe_router_score_function": "softmax",
        "moe_router_pre_softmax": False,
        "moe_router_topk_scaling_factor": None,
        "moe_router_num_groups": None,
        "moe_router_group_topk": None,
        "moe_router_enable_expert_bias": False,
        "moe_shared_expert_intermediate_size": None,
    }
