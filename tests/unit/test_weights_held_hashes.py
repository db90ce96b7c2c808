"""What a server's ranks must hold, and that any difference is named."""

from hashlib import sha256
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dapo_megatron.types import FingerprintError, MappingError
from dapo_megatron.weights.engine_layout import engine_layout
from dapo_megatron.weights.held_hashes import HeldHashes, differences
from dapo_megatron.weights.plan import compile_mapping
from dapo_megatron.weights.word_hash import WordHash
from tests.unit.weights_simulation import CONFIGS, LLAMA_TIED, QWEN2, identity_fill

MOE = QWEN2 | {
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "head_dim": 4,
    "norm_topk_prob": True,
}


def held(config, ranks, tensors):
    """Per rank: engine tensor -> its elements in memory order."""
    layout = engine_layout(compile_mapping(config), config, ranks, "cuda")
    return [
        {
            tensor.name: np.concatenate(
                [*(tensors[part.hf_name][part.slices].ravel() for part in tensor.parts), np.zeros(tensor.num_zeros, int)]
            )
            for tensor in of_rank
        }
        for of_rank in layout
    ]


def reports(config, ranks, tensors):
    """As a server that holds `tensors` (float32) would answer."""
    return [
        {
            "checksums": {name: sha256(values.astype(np.float32).tobytes()).hexdigest()[:16] for name, values in of_rank.items()},
            "parallelism_info": [{"tp_rank": rank}],
        }
        for rank, of_rank in enumerate(held(config, ranks, tensors))
    ]


def expected(config, ranks, tensors, device="cpu"):
    hashes = HeldHashes(engine_layout(compile_mapping(config), config, ranks, "cuda"), device, itemsize=4)
    for name in compile_mapping(config).hf_tensors:
        hashes.add(name, torch.from_numpy(tensors[name]).to(torch.float32))
    return hashes.finish()


def moe_tensors():
    shapes = compile_mapping(MOE).hf_tensors
    starts = np.cumsum([0, *(int(np.prod(shape)) for shape in shapes.values())])
    return {
        name: np.arange(start, start + np.prod(shape)).reshape(shape)
        for (name, shape), start in zip(shapes.items(), starts, strict=False)
    }


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_ranks_together_hold_every_element(config, ranks):
    tensors = identity_fill(config)
    elements = np.concatenate([values for of_rank in held(config, ranks, tensors) for values in of_rank.values()])
    assert set(elements) - {0} == set(np.concatenate([tensor.ravel() for tensor in tensors.values()]))


def test_query_key_and_value_rows_of_a_rank_lie_in_one_tensor():
    tensors = identity_fill(QWEN2)
    prefix = "model.layers.0.self_attn."
    wanted = [np.split(tensors[f"{prefix}{part}_proj.weight"], 2)[1].ravel() for part in "qkv"]
    assert np.array_equal(held(QWEN2, 2, tensors)[1][f"{prefix}qkv_proj.weight"], np.concatenate(wanted))


def test_key_value_heads_are_held_by_several_ranks_when_there_are_more_ranks():
    tensors = identity_fill(QWEN2)
    prefix, head_dim = "model.layers.0.self_attn.", 2
    key = tensors[f"{prefix}k_proj.weight"]
    for rank, of_rank in enumerate(held(QWEN2, 8, tensors)):
        rows = of_rank[f"{prefix}qkv_proj.weight"].reshape(-1, key.shape[1])
        assert np.array_equal(rows[head_dim : 2 * head_dim], np.split(key, 4)[rank // 2])


def test_vocabulary_is_padded_with_zeros():
    tensors = identity_fill(LLAMA_TIED)
    first, second = (of_rank["model.embed_tokens.weight"].reshape(-1, 16) for of_rank in held(LLAMA_TIED, 2, tensors))
    assert len(first) == len(second) == 32
    assert np.array_equal(first[:21], tensors["model.embed_tokens.weight"])
    assert not first[21:].any() and not second.any()


def test_experts_of_a_layer_are_stacked_gate_before_up():
    tensors = moe_tensors()
    prefix = "model.layers.0.mlp.experts."
    stacked = held(MOE, 2, tensors)[1][f"{prefix}w13_weight"].reshape(4, 2, 4, 16)
    for expert in range(4):
        for index, part in enumerate(("gate", "up")):
            assert np.array_equal(stacked[expert, index], np.split(tensors[f"{prefix}{expert}.{part}_proj.weight"], 2)[1])


@pytest.mark.parametrize("ranks", [1, 2])
def test_server_that_holds_what_was_sent_differs_in_nothing(ranks):
    for config, tensors in [(QWEN2, identity_fill(QWEN2)), (MOE, moe_tensors())]:
        assert differences(expected(config, ranks, tensors), reports(config, ranks, tensors)) == []


def test_server_on_gpus_is_compared_by_its_own_hash():
    tensors = identity_fill(QWEN2)
    of_name = held(QWEN2, 1, tensors)[0]
    for name, value in expected(QWEN2, 1, tensors, device="cuda")[0].items():
        assert value == word_hash(of_name[name].astype(np.float32).tobytes())


def word_hash(data, *cuts):
    hash = WordHash(len(data))
    for start, stop in pairwise([0, *cuts, len(data)]):
        hash.update(torch.frombuffer(bytearray(data), dtype=torch.uint8)[start:stop])
    return hash.hexdigest()


GPU_HASHES = {1: "3d93a6540b54ef2a", 6: "2760c3a85edbc637", 32768: "185a46a7e5b677e7", 100001: "8ca0ad43a702763d"}
"""What SGLang 0.5.23's `gpu_tensor_hash` gives for `hashed_bytes` of that length, recorded."""


def hashed_bytes(num_bytes):
    return (np.arange(num_bytes, dtype=np.uint64) * 2654435761 >> 13).astype(np.uint8).tobytes()


@pytest.mark.parametrize("num_bytes", GPU_HASHES)
def test_hash_is_the_one_that_servers_on_gpus_report(num_bytes):
    assert word_hash(hashed_bytes(num_bytes)) == GPU_HASHES[num_bytes]


@given(st.integers(1, 100_000), st.data())
def test_hash_does_not_depend_on_how_the_bytes_come(num_bytes, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, num_bytes), max_size=4)))
    assert word_hash(hashed_bytes(num_bytes), *cuts) == word_hash(hashed_bytes(num_bytes))


@pytest.mark.parametrize(
    "name", ["model.layers.1.self_attn.k_proj.bias", "model.layers.0.mlp.down_proj.weight", "model.norm.weight"]
)
def test_one_wrong_element_is_named(name):
    tensors = identity_fill(QWEN2)
    wanted = expected(QWEN2, 2, tensors)
    tensors[name].flat[-1] += 1
    sentences = differences(wanted, reports(QWEN2, 2, tensors))
    assert any(name.replace("k_proj", "qkv_proj") in sentence and "rank 1" in sentence for sentence in sentences)


def test_tensors_that_are_missing_or_were_never_sent_are_named():
    tensors = identity_fill(QWEN2)
    answer = reports(QWEN2, 1, tensors)
    del answer[0]["checksums"]["model.norm.weight"]
    answer[0]["checksums"]["model.extra.weight"] = "0" * 16
    missing, unsent = differences(expected(QWEN2, 1, tensors), answer)
    assert "are missing: model.norm.weight" in missing and "never sent: model.extra.weight" in unsent


def test_server_with_other_ranks_is_told_apart():
    tensors = identity_fill(QWEN2)
    assert "where 2 were expected" in differences(expected(QWEN2, 2, tensors), reports(QWEN2, 1, tensors))[0]
    twice = reports(QWEN2, 1, tensors) * 2  # data-parallel copies of one rank: none may pass unseen
    assert "ranks [0, 0] where 1 were expected" in differences(expected(QWEN2, 1, tensors), twice)[0]


def test_tensors_out_of_turn_or_left_out_are_refused():
    hashes = HeldHashes(engine_layout(compile_mapping(QWEN2), QWEN2, 1, "cpu"), "cpu", itemsize=4)
    with pytest.raises(FingerprintError, match="k_proj.weight came out of turn"):
        hashes.add("model.layers.0.self_attn.k_proj.weight", torch.zeros(8, 16))
    with pytest.raises(FingerprintError, match="was not sent"):
        hashes.finish()


def test_layout_that_is_not_known_is_refused():
    with pytest.raises(MappingError, match="deepseek_v2.*must be one of llama, qwen2"):
        engine_layout(compile_mapping(QWEN2), QWEN2 | {"model_type": "deepseek_v2"}, 1, "cpu")


def test_ranks_that_cannot_share_a_tensor_are_refused():
    with pytest.raises(MappingError, match="tensor_parallel_size must divide"):
        engine_layout(compile_mapping(QWEN2), QWEN2, 3, "cuda")


def test_width_that_servers_on_cpus_pad_is_refused():
    with pytest.raises(MappingError, match="intermediate_size .24. must be a multiple of 64"):
        engine_layout(compile_mapping(QWEN2), QWEN2, 2, "cpu")
