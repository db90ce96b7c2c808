"""Every family over its real dimensions, its config map, its checkpoint names, and the page that adds one."""

import json
import math
import re
import runpy
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from dapo_megatron.types import MappingError
from dapo_megatron.weights.checkpoint_keys import CheckpointPlace, checkpoint_places, unstacked_name
from dapo_megatron.weights.families import FAMILIES, megatron_arguments
from dapo_megatron.weights.hf_files import HfFiles
from dapo_megatron.weights.layout import parse_table
from dapo_megatron.weights.plan import compile_mapping
from tests.published_configs import (
    DEEPSEEK_V2_LITE,
    DEEPSEEK_V3,
    LLAMA3_70B,
    MIXTRAL_8X7B,
    MOONLIGHT_16B_A3B,
    PUBLISHED,
    QWEN2_5_32B,
    QWEN3_8B,
    QWEN3_235B_A22B,
)


@pytest.fixture(scope="module")
def mappings():
    return {name: compile_mapping(config) for name, (config, _) in PUBLISHED.items()}


def test_every_family_has_a_published_model():
    assert {config["model_type"] for config, _ in PUBLISHED.values()} == FAMILIES.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_mapping_of_a_published_model_tiles_and_has_all_its_parameters(mappings, name):
    num_parameters = PUBLISHED[name][1]
    mapping = mappings[name]  # compiling proves that it tiles
    assert sum(math.prod(shape) for shape in mapping.hf_tensors.values()) == num_parameters
    assert sum(math.prod(tensor.shape) for tensor in mapping.tensors.values()) == num_parameters


def test_every_line_of_every_table_is_used_by_a_published_model(mappings):
    for model_type, family in FAMILIES.items():
        names = [n for name, m in mappings.items() if PUBLISHED[name][0]["model_type"] == model_type for n in m.tensors]
        for rule in parse_table(family.table):
            prefix, ending = rule.mcore_pattern.split("{")[0], rule.mcore_pattern.split("}")[-1]
            used = any(name.startswith(prefix) and name.endswith(ending) for name in names)
            assert used or rule.condition or model_type == "qwen3_moe", rule  # no published Qwen3-MoE has dense layers


def test_layers_come_in_order_and_experts_inside_their_layer(mappings):
    names = list(mappings["DeepSeek-V2-Lite"].hf_tensors)
    layers = [int(name.split(".")[2]) for name in names if ".layers." in name]
    assert layers == sorted(layers)
    first_layer = [name for name in names if name.startswith("model.layers.1.mlp.experts.")]
    assert first_layer[:4] == [
        "model.layers.1.mlp.experts.0.gate_proj.weight",
        "model.layers.1.mlp.experts.0.up_proj.weight",
        "model.layers.1.mlp.experts.0.down_proj.weight",
        "model.layers.1.mlp.experts.1.gate_proj.weight",
    ]


def test_layers_without_experts_have_a_dense_mlp():
    config = QWEN3_235B_A22B | {"num_hidden_layers": 6, "num_experts": 2, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    mapping = compile_mapping(config)
    dense = {layer for layer in range(6) if f"decoder.layers.{layer}.mlp.linear_fc1.weight" in mapping.tensors}
    experts = {layer for layer in range(6) if f"decoder.layers.{layer}.mlp.router.weight" in mapping.tensors}
    assert (dense, experts) == ({0, 2, 3, 4}, {1, 5})
    assert megatron_arguments(config)["moe_layer_freq"] == [0, 1, 0, 0, 0, 1]


def test_renamed_config_field_means_the_same():
    renamed = {("num_local_experts" if key == "num_experts" else key): value for key, value in QWEN3_235B_A22B.items()}
    assert megatron_arguments(renamed) == megatron_arguments(QWEN3_235B_A22B)


def test_router_bias_stays_in_fp32(mappings):
    tensors = mappings["DeepSeek-V3"].tensors
    assert {name.split(".", 3)[3] for name, tensor in tensors.items() if tensor.in_fp32} == {"mlp.router.expert_bias"}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            LLAMA3_70B,
            {
                "num_layers": 80,
                "hidden_size": 8192,
                "ffn_hidden_size": 28672,
                "num_attention_heads": 64,
                "num_query_groups": 8,
                "kv_channels": 128,
                "rotary_base": 500000,
                "use_rope_scaling": True,
                "rope_scaling_factor": 8.0,
                "add_qkv_bias": False,
                "layernorm_epsilon": 1e-5,
                "untie_embeddings_and_output_weights": True,
            },
        ),
        (QWEN2_5_32B, {"add_qkv_bias": True, "kv_channels": 128, "use_rope_scaling": False, "rotary_base": 1000000}),
        (QWEN3_8B, {"qk_layernorm": True, "kv_channels": 128}),
        (
            QWEN3_235B_A22B,
            {
                "num_experts": 128,
                "moe_ffn_hidden_size": 1536,
                "moe_router_topk": 8,
                "moe_router_pre_softmax": False,
                "moe_layer_freq": 1,
            },
        ),
        (MIXTRAL_8X7B, {"num_experts": 8, "moe_ffn_hidden_size": 14336, "moe_router_topk": 2}),
        (
            DEEPSEEK_V3,
            {
                "moe_layer_freq": [0] * 3 + [1] * 58,
                "moe_shared_expert_intermediate_size": 2048,
                "moe_router_score_function": "sigmoid",
                "moe_router_enable_expert_bias": True,
                "moe_router_topk_scaling_factor": 2.5,
                "moe_router_num_groups": 8,
                "moe_router_group_topk": 4,
                "multi_latent_attention": True,
                "q_lora_rank": 1536,
                "qk_head_dim": 128,
                "qk_pos_emb_head_dim": 64,
                "rope_type": "yarn",
                "rotary_scaling_factor": 40.0,
                "mscale_all_dim": 1.0,
            },
        ),
        (
            DEEPSEEK_V2_LITE,
            {"q_lora_rank": None, "moe_router_pre_softmax": True, "moe_router_num_groups": None, "mscale": 0.707},
        ),
        (MOONLIGHT_16B_A3B, {"rope_type": "rope", "rotary_base": 50000, "rotary_scaling_factor": 1.0}),
    ],
    ids=lambda value: value.get("model_type", ""),
)
def test_config_map_says_the_model_in_megatrons_words(config, expected):
    arguments = megatron_arguments(config)
    assert {name: arguments[name] for name in expected} == expected


def test_expert_is_a_slice_of_a_stacked_tensor(mappings):
    name = "decoder.layers.5.mlp.experts.experts.7.linear_fc1.weight"
    mapping = mappings["Mixtral-8x7B-v0.1"]
    key = "mlp.experts.experts.linear_fc1.weight"
    by_layer = checkpoint_places(mapping, stacked_layers=False)
    assert by_layer[name] == CheckpointPlace(f"decoder.layers.5.{key}", (7,), (8,))
    stacked = checkpoint_places(mapping, stacked_layers=True)
    assert stacked[name] == CheckpointPlace(f"decoder.layers.{key}", (5, 7), (32, 8))


def test_norm_has_the_name_of_the_linear_it_is_fused_into(mappings):
    places = checkpoint_places(mappings["DeepSeek-V3"], stacked_layers=False)
    keys = {name.removeprefix("decoder."): place.key.removeprefix("decoder.") for name, place in places.items()}
    assert keys["layers.0.pre_mlp_layernorm.weight"] == "layers.0.mlp.linear_fc1.layer_norm_weight"
    assert keys["layers.3.pre_mlp_layernorm.weight"] == "layers.3.pre_mlp_layernorm.weight"
    assert keys["layers.3.input_layernorm.weight"] == "layers.3.input_layernorm.weight"
    assert keys["layers.3.self_attention.q_layernorm.weight"] == "layers.3.self_attention.linear_q_up_proj.layer_norm_weight"
    dense = checkpoint_places(mappings["Llama-3.2-1B"], stacked_layers=True)
    place = dense["decoder.layers.3.input_layernorm.weight"]
    assert place == CheckpointPlace("decoder.layers.self_attention.linear_qkv.layer_norm_weight", (3,), (16,))


@pytest.mark.parametrize("stacked_layers", [False, True])
@pytest.mark.parametrize("name", ["Llama-3.2-1B", "Mixtral-8x7B-v0.1", "DeepSeek-V2-Lite"])
def test_checkpoint_names_lead_back_to_the_mapping(mappings, name, stacked_layers):
    mapping = mappings[name]
    for tensor, place in checkpoint_places(mapping, stacked_layers=stacked_layers).items():
        assert mapping.canonical_name(unstacked_name(place.key, place.index)) == tensor


def test_stacked_tensor_with_an_axis_too_many_is_refused():
    with pytest.raises(MappingError, match="stacked over 2 axes, its name leaves out 1"):
        unstacked_name("decoder.layers.3.mlp.experts.experts.linear_fc1.weight", (1, 2))


SMALL_FP8 = {
    "model_type": "llama",
    "hidden_size": 200,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 100,
    "intermediate_size": 130,
    "num_hidden_layers": 1,
    "vocab_size": 21,
    "tie_word_embeddings": True,
    "quantization_config": DEEPSEEK_V3["quantization_config"],
}


@pytest.fixture
def fp8_model(tmp_path):
    """(directory, the weights it stands for): matrices of the layer in FP8 with a scale per 128 x 128, the rest in bf16."""
    generator = torch.Generator().manual_seed(0)
    files, meant = {}, {}
    for name, shape in compile_mapping(SMALL_FP8).hf_tensors.items():
        tensor = torch.randn(shape, generator=generator)
        if "proj" not in name:
            files[name] = meant[name] = tensor.bfloat16()
            continue
        scales = torch.rand(-(-shape[0] // 128), -(-shape[1] // 128), generator=generator) + 0.5
        files[name], files[f"{name}_scale_inv"] = tensor.to(torch.float8_e4m3fn), scales
        by_element = torch.tensor([[scales[row // 128, column // 128] for column in range(shape[1])] for row in range(shape[0])])
        meant[name] = (files[name].float() * by_element).bfloat16()
    (tmp_path / "config.json").write_text(json.dumps(SMALL_FP8))
    save_file(files, tmp_path / "model.safetensors")
    return tmp_path, meant


def test_block_scaled_fp8_is_read_as_bf16_whole_and_in_slices_that_cut_blocks(fp8_model):
    directory, meant = fp8_model
    files = HfFiles(directory)
    assert files.check(compile_mapping(SMALL_FP8)) == {}
    for name, tensor in meant.items():
        assert torch.equal(files.read(name), tensor), name
    name = "model.layers.0.self_attn.q_proj.weight"
    for rows, columns in ((slice(3, 9), slice(0, 200)), (slice(120, 170), slice(127, 129)), (slice(128, 200), slice(64, 192))):
        assert torch.equal(files.read(name, (rows, columns)), meant[name][rows, columns])


def test_fp8_weight_without_its_scales_is_refused(fp8_model):
    directory, _ = fp8_model
    tensors = load_file(directory / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight_scale_inv"
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, directory / "model.safetensors")
    with pytest.raises(MappingError, match=r"down_proj\.weight is FP8, so .*_scale_inv must be \(2, 2\) F32, and there is none"):
        HfFiles(directory).check(compile_mapping(SMALL_FP8))


def test_prediction_layers_are_skipped_with_the_reason():
    config = DEEPSEEK_V2_LITE | {"model_type": "deepseek_v3", "num_nextn_predict_layers": 2, "num_hidden_layers": 2}
    ((first, reason), (second, _)) = compile_mapping(config).skipped.items()
    assert (first, second) == (r"model\.layers\.2\..+", r"model\.layers\.3\..+")
    assert "not part of the policy" in reason


def test_the_family_of_the_docs_page_is_transformers_own(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "families.md").read_text()
    example, check = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    (tmp_path / "example.py").write_text(example)
    (tmp_path / "check.py").write_text(check)
    monkeypatch.setitem(FAMILIES, "qwen2_moe", runpy.run_path(str(tmp_path / "example.py"))["FAMILY"])

    config = transformers.Qwen2MoeConfig(
        hidden_size=16,
        intermediate_size=24,
        moe_intermediate_size=6,
        shared_expert_intermediate_size=10,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=3,
        num_experts_per_tok=2,
        vocab_size=21,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    names = {"config": saved, "directory": tmp_path, "math": math, "compile_mapping": compile_mapping, "HfFiles": HfFiles}
    checked = runpy.run_path(str(tmp_path / "check.py"), names)
    assert checked["ignored"] == {}
    assert checked["num_parameters"] == model.num_parameters()
    arguments = megatron_arguments(saved)
    assert (arguments["num_experts"], arguments["moe_shared_expert_intermediate_size"]) == (3, 10)
