"""Build this rank's GPTModel chunks. Parallel state must be initialised; weights are left to the loader."""

from __future__ import annotations

from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from dapo_megatron.models.architecture import Architecture
from dapo_megatron.models.rope import PackedLatentRotaryEmbedding, PackedRotaryEmbedding, inverse_frequencies
from dapo_megatron.models.spec import Implementation, block_spec


def build_model(architecture: Architecture, config: TransformerConfig, implementation: Implementation) -> list[GPTModel]:
    """One GPTModel per virtual pipeline stage of this rank (one without interleaving), parameters uninitialised."""
    stages = range(config.virtual_pipeline_model_parallel_size) if config.virtual_pipeline_model_parallel_size else [None]
    return [_build_chunk(architecture, config, implementation, stage) for stage in stages]


def _build_chunk(
    architecture: Architecture, config: TransformerConfig, implementation: Implementation, vp_stage: int | None
) -> GPTModel:
    first = get_transformer_layer_offset(config, vp_stage)
    layers = range(first, first + get_num_layers_to_build(config, vp_stage))
    model = GPTModel(
        config,
        block_spec(architecture, config, implementation, layers),
        vocab_size=architecture.padded_vocab_size(config.tensor_model_parallel_size),
        max_sequence_length=architecture.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        share_embeddings_and_output_weights=architecture.tie_word_embeddings,
        position_embedding_type="rope",
        rotary_base=architecture.rope_theta,
        vp_stage=vp_stage,
    )
    if isinstance(config, MLATransformerConfig):
        if implementation == "local":
            for layer in model.decoder.layers:
                layer.self_attention.rotary_pos_emb = PackedLatentRotaryEmbedding(architecture, config)
        return model
    if implementation == "local":
        model.rotary_pos_emb = PackedRotaryEmbedding(architecture, config)
    else:
        model.rotary_pos_emb.inv_freq = inverse_frequencies(architecture)
    return model
