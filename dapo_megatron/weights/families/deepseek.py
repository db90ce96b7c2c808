"""DeepSeek-V2, DeepSeek-V3 and Moonlight (`deepseek_v3`): latent attention, shared experts, first layers dense.

The rotary rows of q and k lie in interleaved pairs on both sides (megatron-core's MLA separates them as transformers does), so
no row is moved. The multi-token-prediction layers behind the last one are skipped: the policy is the decoder, its loss does not
train them, and trained on the hidden states of other weights they would only go stale.
"""

from __future__ import annotations

from collections.abc import Mapping

from dapo_megatron.weights.families.dense import DECODER, DENSE_MLP, NORM_ALIASES, decoder_arguments
from dapo_megatron.weights.families.family import Arguments, Config, Family, positive
from dapo_megatron.weights.families.moe import EXPERTS, dense_and_moe_layers, moe_arguments
from dapo_megatron.weights.families.rope import rope_parameters, scaling_number

_LATENT_ATTENTION = """
decoder.layers.{L}.self_attention.linear_q_proj.weight model.layers.{L}.self_attn.q_proj.weight a*x h if not q_lora_rank
decoder.layers.{L}.self_attention.linear_q_down_proj.weight model.layers.{L}.self_attn.q_a_proj.weight q h if q_lora_rank
decoder.layers.{L}.self_attention.q_layernorm.weight model.layers.{L}.self_attn.q_a_layernorm.weight q if q_lora_rank
decoder.layers.{L}.self_attention.linear_q_up_proj.weight model.layers.{L}.self_attn.q_b_proj.weight a*x q if q_lora_rank
decoder.layers.{L}.self_attention.linear_kv_down_proj.weight model.layers.{L}.self_attn.kv_a_proj_with_mqa.weight z h
decoder.layers.{L}.self_attention.kv_layernorm.weight model.layers.{L}.self_attn.kv_a_layernorm.weight c
decoder.layers.{L}.self_attention.linear_kv_up_proj.weight model.layers.{L}.self_attn.kv_b_proj.weight a*y c
decoder.layers.{L}.self_attention.linear_proj.weight model.layers.{L}.self_attn.o_proj.weight h a*w
"""

_SHARED_EXPERTS = """
decoder.layers.{M}.mlp.shared_experts.linear_fc1.weight model.layers.{M}.mlp.shared_experts.{gate,up}_proj.weight [gate:s*m | up:s*m] h if n_shared_experts
decoder.layers.{M}.mlp.shared_experts.linear_fc2.weight model.layers.{M}.mlp.shared_experts.down_proj.weight h s*m if n_shared_experts
"""

_ROUTER_BIAS = """
decoder.layers.{M}.mlp.router.expert_bias model.layers.{M}.mlp.gate.e_score_correction_bias E in fp32
"""

_ALIASES = NORM_ALIASES | {
    ".self_attention.linear_q_up_proj.layer_norm_weight": ".self_attention.q_layernorm.weight",
    ".self_attention.linear_kv_up_proj.layer_norm_weight": ".self_attention.kv_layernorm.weight",
}


def _sizes(config: Config) -> dict[str, int]:
    """a heads, q and c ranks of the query and key/value latents, x width of a query head, y rows of a head in kv_b_proj (key and
    value), z rows of kv_a_proj_with_mqa (latent and rotary key), w width of a value head, s shared experts, m width of an expert.
    """
    rotary, plain = positive(config, "qk_rope_head_dim"), positive(config, "qk_nope_head_dim")
    latent, value = positive(config, "kv_lora_rank"), positive(config, "v_head_dim")
    return {
        "L": positive(config, "num_hidden_layers"),
        "E": positive(config, "n_routed_experts"),
        "h": positive(config, "hidden_size"),
        "v": positive(config, "vocab_size"),
        "f": positive(config, "intermediate_size"),
        "m": positive(config, "moe_intermediate_size"),
        "s": config["n_shared_experts"] or 0,
        "a": positive(config, "num_attention_heads"),
        "q": config["q_lora_rank"] or 0,
        "c": latent,
        "x": plain + rotary,
        "y": plain + value,
        "z": latent + rotary,
        "w": value,
    }


def _is_moe(config: Config) -> list[bool]:
    return [layer >= config["first_k_dense_replace"] for layer in range(positive(config, "num_hidden_layers"))]


def _rope_arguments(config: Config) -> Arguments:
    rope = rope_parameters(config)
    if rope["rope_type"] != "yarn":
        # megatron-core scales the attention by the factor under plain rotary positions too.
        return {"rope_type": "rope", "rotary_scaling_factor": 1.0}
    return {
        "rope_type": "yarn",
        "rotary_scaling_factor": float(scaling_number(rope, "factor")),
        "original_max_position_embeddings": scaling_number(rope, "original_max_position_embeddings"),
        "beta_fast": float(rope.get("beta_fast") or 32),
        "beta_slow": float(rope.get("beta_slow") or 1),
        "mscale": float(rope.get("mscale") or 1),
        "mscale_all_dim": float(rope.get("mscale_all_dim") or 0),
    }


def _latent_attention_arguments(config: Config) -> Arguments:
    return {
        "multi_latent_attention": True,
        "qk_layernorm": True,
        "q_lora_rank": config["q_lora_rank"] or None,
        "kv_lora_rank": positive(config, "kv_lora_rank"),
        "qk_head_dim": positive(config, "qk_nope_head_dim"),
        "qk_pos_emb_head_dim": positive(config, "qk_rope_head_dim"),
        "v_head_dim": positive(config, "v_head_dim"),
        **_rope_arguments(config),
    }


def _arguments(config: Config) -> Arguments:
    sizes, is_moe = _sizes(config), _is_moe(config)
    experts = moe_arguments(config, num_experts=sizes["E"], expert_width=sizes["m"], is_moe=is_moe)
    router = {
        "moe_shared_expert_intermediate_size": sizes["s"] * sizes["m"] or None,
        "moe_router_topk_scaling_factor": float(config["routed_scaling_factor"]),
    }
    if config["topk_method"] != "greedy":
        router |= {"moe_router_num_groups": config["n_group"], "moe_router_group_topk": config["topk_group"]}
    return decoder_arguments(config) | _latent_attention_arguments(config) | experts | router


def _mtp_layers(config: Config) -> Mapping[str, str]:
    first, count = positive(config, "num_hidden_layers"), config["num_nextn_predict_layers"]
    reason = "multi-token prediction is not part of the policy; the model generates without it"
    return {rf"model\.layers\.{layer}\..+": reason for layer in range(first, first + count)}


_DEFAULTS = {
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
    "q_lora_rank": None,
    "num_nextn_predict_layers": 0,
    "n_group": None,
    "topk_group": None,
}

DEEPSEEK_V2 = Family(
    model_type="deepseek_v2",
    table=DECODER + _LATENT_ATTENTION + DENSE_MLP + EXPERTS + _SHARED_EXPERTS,
    sizes=_sizes,
    arguments=lambda config: _arguments(config) | {"moe_router_pre_softmax": True},
    defaults=_DEFAULTS
    | {
        "n_shared_experts": 2,
        "first_k_dense_replace": 0,
        "routed_scaling_factor": 1.0,
        "topk_method": "greedy",
    },
    must_be_off=("attention_bias", "mlp_bias"),
    aliases=_ALIASES,
    layers=lambda config: dense_and_moe_layers(_is_moe(config)),
    renamed_fields={"num_experts": "n_routed_experts"},
)

DEEPSEEK_V3 = Family(
    model_type="deepseek_v3",
    table=DECODER + _LATENT_ATTENTION + DENSE_MLP + EXPERTS + _SHARED_EXPERTS + _ROUTER_BIAS,
    sizes=_sizes,
    arguments=lambda config: _arguments(config) | {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True},
    defaults=_DEFAULTS
    | {
        "n_shared_experts": 1,
        "first_k_dense_replace": 3,
        "routed_scaling_factor": 2.5,
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "n_group": 8,
        "topk_group": 4,
    },
    must_be_off=("attention_bias",),
    aliases=_ALIASES,
    layers=lambda config: dense_and_moe_layers(_is_moe(config)),
    skipped=_mtp_layers,
    renamed_fields={"num_local_experts": "n_routed_experts"},
)
