"""TransformerConfig and layer spec of a decoder, for the two implementations `local` and `transformer_engine`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_submodules,
    get_gpt_layer_with_transformer_engine_spec,
    get_mlp_module_spec_for_backend,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

from dapo_megatron.config.schema import ActorConfig, ModelConfig
from dapo_megatron.models.architecture import Architecture
from dapo_megatron.models.attention import PackedSelfAttention
from dapo_megatron.models.latent_attention import PackedLatentAttention
from dapo_megatron.models.norm import LatentRMSNorm, SequenceParallelRMSNorm
from dapo_megatron.models.swiglu import SwiGLUSpecProvider
from dapo_megatron.types import ConfigError

Implementation = Literal["local", "transformer_engine"]
RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective"},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def choose_implementation(model: ModelConfig) -> Implementation:
    """`auto` means TransformerEngine where CUDA and the package exist."""
    if model.transformer_impl != "auto":
        return model.transformer_impl
    return "transformer_engine" if torch.cuda.is_available() and find_spec("transformer_engine") else "local"


def transformer_config(architecture: Architecture, model: ModelConfig, actor: ActorConfig) -> TransformerConfig:
    """megatron-core's configuration of this decoder under this layout. `actor.megatron_extra` wins over all of it."""
    dtype = DTYPES[model.dtype]
    config_class = MLATransformerConfig if architecture.latent_attention else TransformerConfig
    fused = choose_implementation(model) == "transformer_engine"
    latent_attention = architecture.latent_attention
    if fused and latent_attention and latent_attention["q_lora_rank"] is None:
        raise ConfigError(
            f"model.transformer_impl must be local for {model.path}: with TransformerEngine megatron-core 0.19.2 puts a second norm in "
            "front of the queries of a model without q_lora_rank; set it to local."
        )
    groups = architecture.padded_query_groups(actor.tensor_parallel_size)
    fields: dict[str, Any] = dict(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size,
        num_attention_heads=groups * architecture.num_attention_heads // architecture.num_query_groups,
        num_query_groups=groups,
        kv_channels=None if architecture.latent_attention else architecture.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=architecture.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=architecture.qkv_bias,
        qk_layernorm=architecture.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=actor.tensor_parallel_size,
        pipeline_model_parallel_size=actor.pipeline_parallel_size,
        virtual_pipeline_model_parallel_size=actor.virtual_pipeline_size,
        num_layers_in_first_pipeline_stage=actor.num_layers_in_first_pipeline_stage,
        num_layers_in_last_pipeline_stage=actor.num_layers_in_last_pipeline_stage,
        context_parallel_size=actor.context_parallel_size,
        cp_comm_type="p2p",  # TransformerEngine's ring, which takes packs in the zig-zag cut of `context_parallel.py`
        expert_model_parallel_size=actor.expert_parallel_size,
        sequence_parallel=actor.sequence_parallel,
        # Packs differ in length, so pipeline stages exchange shapes; without this flag wrong shapes go unnoticed.
        variable_seq_lengths=True,
        # Interleaving on two stages has both directions between one pair of ranks: batched, they would be confused.
        overlap_p2p_comm=actor.virtual_pipeline_size is not None,
        batch_p2p_comm=actor.virtual_pipeline_size is None,
        expert_tensor_parallel_size=actor.expert_tensor_parallel_size,
        moe_token_dispatcher_type="alltoall",  # the only one that takes variable lengths; checked for dense models too
        calculate_per_token_loss=True,
        # Weights are always loaded from the HF directory.
        perform_initialization=False,
        use_cpu_initialization=not torch.cuda.is_available(),
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        bias_activation_fusion=fused,
        use_te_activation_func=not fused,  # modules of the layer spec's own: `SwiGLU`
        bias_dropout_fusion=fused,
        apply_rope_fusion=fused and (architecture.latent_attention or {}).get("rope_type") != "rope",
        **RECOMPUTE[actor.recompute],
        **(architecture.latent_attention or {}),
        **(experts_fields(architecture.experts, fused) if architecture.experts else {}),
    )
    return config_class(**{**fields, **actor.megatron_extra})


def experts_fields(experts: Mapping[str, Any], fused: bool) -> dict[str, Any]:
    """Routing is the model's own: fp32, no balancing loss, no token dropped, and the router bias stays as it was trained.

    The policy gradient is of the model that sampled, and engines route without any of these.
    """
    return dict(
        experts,
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="none",
        moe_aux_loss_coeff=0.0,
        moe_router_bias_update_rate=0.0,
        moe_grouped_gemm=fused,
    )


def block_spec(
    architecture: Architecture, config: TransformerConfig, implementation: Implementation, layers: Sequence[int]
) -> TransformerBlockSubmodules:
    """Layer specs of one model chunk; `layers` are their numbers, counted from 0 over the whole model."""
    norm: Any = SequenceParallelRMSNorm
    if implementation == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TENorm

        norm = TENorm
    of_kind = _transformer_engine_layer if implementation == "transformer_engine" else _local_layer
    kinds = {kind: of_kind(config, kind) for kind in {architecture.has_experts(layer) for layer in layers}}
    return TransformerBlockSubmodules(layer_specs=[kinds[architecture.has_experts(layer)] for layer in layers], layer_norm=norm)


def _transformer_engine_layer(config: TransformerConfig, has_experts: bool) -> ModuleSpec:
    return get_gpt_layer_with_transformer_engine_spec(
        num_experts=config.num_moe_experts if has_experts else None,
        moe_grouped_gemm=config.moe_grouped_gemm,
        qk_layernorm=config.qk_layernorm,
        multi_latent_attention=config.multi_latent_attention,
    )


def _local_layer(config: TransformerConfig, has_experts: bool) -> ModuleSpec:
    """The names in a checkpoint are those of the TransformerEngine spec, so that either implementation loads it."""
    submodules = get_gpt_layer_local_submodules(
        num_experts=config.num_moe_experts if has_experts else None,
        qk_layernorm=config.qk_layernorm,
        multi_latent_attention=config.multi_latent_attention,
        normalization="RMSNorm",
    )
    submodules.mlp = get_mlp_module_spec_for_backend(
        SwiGLUSpecProvider(), config.num_moe_experts if has_experts else None, use_te_activation_func=True
    )
    submodules.input_layernorm = submodules.pre_mlp_layernorm = SequenceParallelRMSNorm
    attention = submodules.self_attention.submodules
    attention.core_attention = PackedSelfAttention
    names = {} if has_experts else {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
    if config.multi_latent_attention:
        submodules.self_attention.module = PackedLatentAttention
        attention.kv_layernorm = LatentRMSNorm
        attention.q_layernorm = LatentRMSNorm if config.q_lora_rank else IdentityOp
        for latent in ("q", "kv"):
            norm, linear = f"self_attention.{latent}_layernorm.", f"self_attention.linear_{latent}_up_proj.layer_norm_"
            names[norm] = linear
    else:
        names["input_layernorm."] = "self_attention.linear_qkv.layer_norm_"
        if attention.q_layernorm is not IdentityOp:
            attention.q_layernorm = attention.k_layernorm = SequenceParallelRMSNorm
    submodules.sharded_state_dict_keys_map = names
    return ModuleSpec(module=TransformerLayer, submodules=submodules)
