"""TransformerConfig and layer spec of a decoder, for the two implementations `local` and `transformer_engine`."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_submodules,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

from dapo_megatron.config.schema import ActorConfig, ModelConfig
from dapo_megatron.models.architecture import Architecture
from dapo_megatron.models.attention import PackedSelfAttention

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
    fused = choose_implementation(model) == "transformer_engine"
    groups = architecture.padded_query_groups(actor.tensor_parallel_size)
    fields: dict[str, Any] = dict(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size,
        num_attention_heads=groups * architecture.num_attention_heads // architecture.num_query_groups,
        num_query_groups=groups,
        kv_channels=architecture.head_dim,
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
        expert_model_parallel_size=actor.expert_parallel_size,
        sequence_parallel=actor.sequence_parallel,
        # Packs differ in length, so pipeline stages exchange shapes; without this flag wrong shapes go unnoticed.
        variable_seq_lengths=True,
        # Interleaving on two stages has both directions between one pair of ranks: batched, they would be confused.
        overlap_p2p_comm=actor.virtual_pipeline_size is not None,
        batch_p2p_comm=actor.virtual_pipeline_size is None,
        moe_token_dispatcher_type="alltoall",  # the only one that takes variable lengths; checked for dense models too
        calculate_per_token_loss=True,
        # Weights are always loaded from the HF directory.
        perform_initialization=False,
        use_cpu_initialization=not torch.cuda.is_available(),
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        bias_activation_fusion=fused,
        bias_dropout_fusion=fused,
        apply_rope_fusion=fused,
        **RECOMPUTE[actor.recompute],
    )
    return TransformerConfig(**{**fields, **actor.megatron_extra})


class SequenceParallelRMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm, marked for megatron-core: under sequence parallelism its gradient is summed over tensor-parallel ranks.

    megatron-core's WrappedTorchNorm refuses sequence parallelism.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def block_spec(config: TransformerConfig, implementation: Implementation, num_layers: int) -> TransformerBlockSubmodules:
    """Layer spec of one model chunk of `num_layers` layers."""
    if implementation == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TENorm

        layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
        return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=TENorm)
    submodules = get_gpt_layer_local_submodules(qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
    submodules.input_layernorm = submodules.pre_mlp_layernorm = SequenceParallelRMSNorm
    attention = submodules.self_attention.submodules
    attention.core_attention = PackedSelfAttention
    if attention.q_layernorm is not IdentityOp:
        attention.q_layernorm = attention.k_layernorm = SequenceParallelRMSNorm
    layer = ModuleSpec(module=TransformerLayer, submodules=submodules)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=SequenceParallelRMSNorm)
