"""Sizes of a model out of its config.json."""

from __future__ import annotations

import pytest

from dapo_megatron.layout.model_shape import Experts, GroupedQueryAttention, LatentAttention, ModelShape
from dapo_megatron.types import ConfigError
from tests.published_configs import DEEPSEEK_V3, LLAMA3_70B, QWEN2_5_32B, QWEN3_8B, QWEN3_235B_A22B


def test_dense_families_differ_in_bias_and_norm_of_queries_and_keys():
    assert ModelShape.from_hf(LLAMA3_70B).attention == GroupedQueryAttention(64, 8, 128)
    assert ModelShape.from_hf(QWEN2_5_32B).attention == GroupedQueryAttention(40, 8, 128, qkv_bias=True)
    assert ModelShape.from_hf(QWEN3_8B).attention == GroupedQueryAttention(32, 8, 128, qk_norm=True)


def test_experts_and_which_layers_have_them():
    qwen, deepseek = ModelShape.from_hf(QWEN3_235B_A22B), ModelShape.from_hf(DEEPSEEK_V3)
    assert qwen.experts == Experts(num_experts=128, num_per_token=8, ffn_hidden_size=1536) and all(qwen.moe_layers)
    assert deepseek.experts == Experts(256, 8, 2048, shared_ffn_hidden_size=2048)
    assert deepseek.moe_layers == (False,) * 3 + (True,) * 58


def test_latent_attention():
    assert ModelShape.from_hf(DEEPSEEK_V3).attention == LatentAttention(128, 1536, 512, nope_dim=128, rope_dim=64, value_dim=128)


@pytest.mark.parametrize("field", ["hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads", "intermediate_size"])
def test_missing_field_is_named(field):
    with pytest.raises(ConfigError, match=rf"{field} \(None\) must be a positive integer; set it in config.json"):
        ModelShape.from_hf({key: value for key, value in QWEN3_8B.items() if key != field})


def test_missing_number_of_a_rope_scaling_is_named():
    with pytest.raises(ConfigError, match=r"factor \(None\) of rope_scaling must be a number: rope_type 'yarn' needs it"):
        ModelShape.from_hf(DEEPSEEK_V3 | {"rope_scaling": {"type": "yarn"}})


def test_unknown_family_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"model_type \('mamba'\) must be one of .*qwen3"):
        ModelShape.from_hf({"model_type": "mamba"})


def test_megatron_defaults_hold_where_arguments_are_silent():
    shape = ModelShape.from_megatron({"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 100})
    assert shape.ffn_hidden_size == 256 and not shape.gated and shape.linear_bias and shape.norm_bias and shape.tied
    assert shape.attention == GroupedQueryAttention(4, 4, 16, qkv_bias=True)


def test_vocabulary_is_padded_up():
    assert ModelShape.from_hf(QWEN3_8B).padded_vocab_size(128 * 8) == 152576
