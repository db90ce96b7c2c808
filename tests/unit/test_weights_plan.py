import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from dapo_megatron.types import MappingError
from dapo_megatron.weights.layout import Run, parse_table
from dapo_megatron.weights.plan import (
    Box,
    MappedTensor,
    ModelMapping,
    check_cover,
    compile_mapping,
    compile_rules,
    import_plan,
    padding_slices,
)
from tests.unit.weights_simulation import (
    CONFIGS,
    LLAMA_TIED,
    LLAMA_UNTIED,
    QWEN2,
    QWEN3,
    identity_fill,
    owned_boxes,
    simulate_ranks,
)

LAYOUTS = [(tp, pp) for tp in (1, 2, 4) for pp in (1, 2)]


def fill(mapping, boxes, hf):
    """Carry out an import plan; what no copy writes stays -1."""
    arrays = [np.full(box.shape, -1) for box in boxes]
    for array, box in zip(arrays, boxes, strict=True):
        for padding in padding_slices(mapping, box):
            array[padding] = 0
    for copy in import_plan(mapping, boxes):
        arrays[copy.box_index][copy.box_slices] = hf[copy.hf_name][copy.hf_slices]
    return arrays


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_import_puts_every_id_where_tensor_algebra_puts_it(config, tp, pp):
    mapping, hf = compile_mapping(config), identity_fill(config)
    for rank in simulate_ranks(config, hf, tp, pp, vocab_multiple=8 * tp):
        arrays = fill(mapping, [piece.box for piece in rank], hf)
        for piece, array in zip(rank, arrays, strict=True):
            np.testing.assert_array_equal(array, piece.expected, err_msg=str(piece.box))


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_plan_read_backwards_restores_the_hf_tensors(config, tp, pp):
    mapping, hf = compile_mapping(config), identity_fill(config)
    ranks = simulate_ranks(config, hf, tp, pp, vocab_multiple=8 * tp)
    restored = {name: np.full(shape, -1) for name, shape in mapping.hf_tensors.items()}
    for rank in ranks:
        owned = [piece for piece in rank if piece.owned]
        for copy in import_plan(mapping, [piece.box for piece in owned]):
            restored[copy.hf_name][copy.hf_slices] = owned[copy.box_index].expected[copy.box_slices]
    assert restored.keys() == hf.keys()
    for name, tensor in hf.items():
        np.testing.assert_array_equal(restored[name], tensor, err_msg=name)


@settings(max_examples=25, deadline=None)
@given(
    tp=st.sampled_from([1, 2, 3]),
    pp=st.integers(1, 2),
    groups_per_rank=st.integers(1, 3),
    heads_per_group=st.integers(1, 3),
    head_dim=st.integers(1, 4),
    hidden=st.integers(1, 7),
    width_per_rank=st.integers(1, 4),
    vocab=st.integers(1, 20),
    tied=st.booleans(),
)
def test_import_is_right_for_any_sizes(tp, pp, groups_per_rank, heads_per_group, head_dim, hidden, width_per_rank, vocab, tied):
    config = QWEN3 | {
        "num_key_value_heads": tp * groups_per_rank,
        "num_attention_heads": tp * groups_per_rank * heads_per_group,
        "head_dim": head_dim,
        "hidden_size": hidden * tp,
        "intermediate_size": width_per_rank * tp,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
    }
    mapping, hf = compile_mapping(config), identity_fill(config)
    ranks = simulate_ranks(config, hf, tp, pp, vocab_multiple=4 * tp)
    check_cover(mapping, [box for boxes in owned_boxes(ranks) for box in boxes])
    for rank in ranks:
        for piece, array in zip(rank, fill(mapping, [piece.box for piece in rank], hf), strict=True):
            np.testing.assert_array_equal(array, piece.expected, err_msg=str(piece.box))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_hf_tensors_are_those_of_transformers(config):
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config))
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert dict(compile_mapping(config).hf_tensors) == expected


def test_tensors_are_ordered_layer_by_layer():
    names = list(compile_mapping(QWEN2).hf_tensors)
    assert names[:3] == ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    layers = [int(name.split(".")[2]) for name in names[3:]]
    assert layers == sorted(layers)


def test_missing_config_fields_take_the_defaults_of_transformers():
    fields = ("num_key_value_heads", "head_dim", "tie_word_embeddings")
    llama = compile_mapping({key: value for key, value in LLAMA_TIED.items() if key not in fields})
    assert llama.hf_tensors["model.layers.0.self_attn.k_proj.weight"] == (16, 16)
    assert "lm_head.weight" in llama.hf_tensors
    qwen3 = compile_mapping({key: value for key, value in QWEN3.items() if key not in fields} | {"num_attention_heads": 32})
    assert qwen3.hf_tensors["model.layers.0.self_attn.k_proj.weight"] == (32 * 128, 16)


def test_norm_names_of_transformer_engine_are_aliases():
    mapping = compile_mapping(LLAMA_TIED)
    for fused, separate in (
        ("decoder.layers.1.self_attention.linear_qkv.layer_norm_weight", "model.layers.1.input_layernorm.weight"),
        ("decoder.layers.1.mlp.linear_fc1.layer_norm_weight", "model.layers.1.post_attention_layernorm.weight"),
    ):
        (copy,) = import_plan(mapping, [Box(fused, (0,), (16,), (16,))])
        assert copy.hf_name == separate


def test_a_box_that_is_all_padding_takes_nothing_from_hf():
    mapping = compile_mapping(LLAMA_TIED)
    box = Box("embedding.word_embeddings.weight", (24, 0), (8, 16), (32, 16))
    assert import_plan(mapping, [box]) == ()
    assert padding_slices(mapping, box) == ((slice(0, 8), slice(0, 16)),)


def test_a_box_without_padding_has_no_padding_slices():
    box = Box("embedding.word_embeddings.weight", (0, 0), (16, 16), (32, 16))
    assert padding_slices(compile_mapping(LLAMA_TIED), box) == ()


@pytest.mark.parametrize(
    ("box", "message"),
    [
        (Box("embedding.word_embeddings.weight", (0, 0), (20, 16), (20, 16)), r"\(20, 16\) must be \(21, 16\) or have more rows"),
        (Box("embedding.word_embeddings.weight", (0, 0), (21, 8), (21, 8)), r"must be \(21, 16\)"),
        (Box("decoder.layers.0.mlp.linear_fc2.weight", (0, 0), (32, 24), (32, 24)), r"\(32, 24\) must be \(16, 24\), as"),
        (Box("decoder.final_layernorm.weight", (0, 0), (16, 1), (16, 1)), r"must be \(16,\)"),
        (Box("decoder.final_layernorm.weight", (8,), (16,), (16,)), "lie inside"),
        (Box("decoder.final_layernorm.weight", (0,), (0,), (16,)), "non-empty"),
        (Box("decoder.final_layernorm.weight", (0, 0), (16,), (16,)), "lie inside"),
        (Box("decoder.layers.2.mlp.linear_fc2.weight", (0, 0), (16, 24), (16, 24)), "not a tensor of this model"),
        (Box("output_layer.weight", (0, 0), (21, 16), (21, 16)), "not a tensor of this model"),
    ],
)
def test_box_that_does_not_fit_the_model_is_refused(box, message):
    with pytest.raises(MappingError, match=message):
        import_plan(compile_mapping(LLAMA_TIED), [box])


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_owner_boxes_cover_the_model(tp, pp):
    ranks = simulate_ranks(QWEN2, identity_fill(QWEN2), tp, pp, vocab_multiple=8 * tp)
    boxes = [box for rank in owned_boxes(ranks) for box in rank]
    check_cover(compile_mapping(QWEN2), boxes)


@pytest.fixture
def tp2_boxes():
    return [box for rank in owned_boxes(simulate_ranks(LLAMA_UNTIED, identity_fill(LLAMA_UNTIED), tp=2)) for box in rank]


def test_a_lost_box_is_named_by_the_cover_check(tp2_boxes):
    lost = next(box for box in tp2_boxes if box.name == "decoder.layers.3.mlp.linear_fc2.weight" and box.offset == (0, 12))
    with pytest.raises(MappingError, match=r"layers\.3\.mlp\.linear_fc2\.weight: rows 0:16, columns 12:24 covered by nothing"):
        check_cover(compile_mapping(LLAMA_UNTIED), [box for box in tp2_boxes if box is not lost])


def test_a_replica_is_named_by_the_cover_check(tp2_boxes):
    replica = next(box for box in tp2_boxes if box.name == "decoder.layers.1.self_attention.linear_qkv.weight")
    with pytest.raises(
        MappingError, match=r"layers\.1\.self_attention\.linear_qkv\.weight: rows 0:16, columns 0:16 covered twice"
    ):
        check_cover(compile_mapping(LLAMA_UNTIED), [*tp2_boxes, replica])


def test_boxes_that_overlap_in_part_are_named_by_the_cover_check(tp2_boxes):
    boxes = [replace(box, shape=(16, 14)) if box.offset == (0, 0) and box.shape == (16, 12) else box for box in tp2_boxes]
    with pytest.raises(MappingError, match=r"columns 12:14 covered twice"):
        check_cover(compile_mapping(LLAMA_UNTIED), boxes)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (Run("b", 0, 4, 3), "t: rows 7:8, columns 0:1 covered by nothing"),
        (Run("b", 0, 3, 4), "t: rows 3:4, columns 0:1 covered twice"),
        (Run("b", 1, 4, 4), "b: rows 4:5, columns 0:1 lies outside|b: rows 1:5, columns 0:1 lies outside"),
        (Run("a", 0, 4, 4), "a: rows 0:4, columns 0:1 covered twice"),
        (Run("c", 0, 4, 4), "takes rows of c, which is not an HF tensor"),
    ],
)
def test_mapping_that_does_not_tile_cannot_be_built(run, message):
    with pytest.raises(MappingError, match=message):
        ModelMapping({"t": MappedTensor((8, 2), False, (Run("a", 0, 0, 4), run))}, {"a": (4, 2), "b": (4, 2)})


def test_hf_tensor_that_no_rule_places_is_refused():
    with pytest.raises(MappingError, match="b: rows 0:4, columns 0:1 covered by nothing"):
        ModelMapping({"t": MappedTensor((4, 2), False, (Run("a", 0, 0, 4),))}, {"a": (4, 2), "b": (4, 2)})


def test_columns_must_be_equal_on_both_sides():
    with pytest.raises(MappingError, match="must have equal columns"):
        ModelMapping({"t": MappedTensor((4, 2), False, (Run("a", 0, 0, 4),))}, {"a": (4, 3)})


@pytest.mark.parametrize(
    ("table", "message"),
    [("a x h\nb x h", "x is used by two lines"), ("a x h\na y h", "a has two lines")],
)
def test_table_with_a_name_twice_is_refused(table, message):
    with pytest.raises(MappingError, match=message):
        compile_rules(parse_table(table), {"h": 2})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "gpt_oss"},
            r"model_type \('gpt_oss'\) must be one of deepseek_v2, deepseek_v3, llama, mixtral, qwen2, qwen3, qwen3_moe",
        ),
        ({"model_type": None}, "model_type"),
        ({"attention_bias": True}, r"attention_bias \(True\) must be false"),
        ({"mlp_bias": True}, r"mlp_bias \(True\) must be false"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantization_config .*gptq.* must be absent, or fp8"),
        ({"num_key_value_heads": 3}, r"num_key_value_heads \(3\) must divide num_attention_heads \(4\)"),
        ({"hidden_size": None}, r"hidden_size \(None\) must be a positive integer"),
        ({"vocab_size": 0}, r"vocab_size \(0\) must be a positive integer"),
    ],
)
def test_config_outside_the_tables_is_refused_by_field(change, message):
    with pytest.raises(MappingError, match=message):
        compile_mapping(LLAMA_TIED | change)


def test_planning_imports_neither_torch_nor_megatron():
    modules = ("plan", "sync", "hf_files", "fingerprint")
    script = "; ".join([*(f"import dapo_megatron.weights.{name}" for name in modules), "import sys"])
    script += "; print(*[name for name in ('torch', 'megatron', 'transformers') if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""
