"""The second oracle: mbridge 0.15.1's own layout of every tensor, recorded by tests/data/record_mbridge.py."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from dapo_megatron.weights.plan import Box, compile_mapping, import_plan

RECORDED = Path(__file__).parent.parent / "data" / "mbridge.npz"
DENSE = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "vocab_size": 10,
    "tie_word_embeddings": False,
}
LATENT = {"q_lora_rank": 5, "kv_lora_rank": 6, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 3}
CONFIGS = {
    "llama": DENSE | {"model_type": "llama"},
    "qwen2": DENSE | {"model_type": "qwen2"},
    "qwen3": DENSE | {"model_type": "qwen3"},
    "qwen3_moe": DENSE | {"model_type": "qwen3_moe", "num_experts": 4, "moe_intermediate_size": 6},
    "mixtral": DENSE | {"model_type": "mixtral", "num_local_experts": 4, "intermediate_size": 6},
    "deepseek_v3": DENSE
    | LATENT
    | {"model_type": "deepseek_v3", "first_k_dense_replace": 1, "n_routed_experts": 4, "moe_intermediate_size": 6},
}


@pytest.fixture(scope="module")
def recorded() -> dict[str, np.ndarray]:
    with np.load(RECORDED) as file:
        index, ids = json.loads(str(file["index"])), file["ids"]
    ends = np.cumsum([np.prod(shape, dtype=int) for shape in index.values()])[:-1]
    arrays = zip(index.items(), np.split(ids, ends), strict=True)
    return {key: array.reshape(shape) for (key, shape), array in arrays}


def of(recorded: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {key.removeprefix(prefix): array for key, array in recorded.items() if key.startswith(prefix)}


def our_name(mbridge_name: str) -> str:
    """mbridge numbers the experts of TransformerEngine's grouped linear: `experts.linear_fc1.weight3`."""
    return re.sub(r"\.experts\.(linear_fc\d)\.weight(\d+)$", r".experts.experts.\2.\1.weight", mbridge_name)


def filled(family: str, boxes: list[Box], hf: dict[str, np.ndarray]) -> list[np.ndarray]:
    arrays = [np.zeros(box.shape, dtype=np.uint16) for box in boxes]
    for copy in import_plan(compile_mapping(CONFIGS[family]), boxes):
        arrays[copy.box_index][copy.box_slices] = hf[copy.hf_name][copy.hf_slices]
    return arrays


@pytest.mark.parametrize("family", CONFIGS)
def test_every_tensor_is_laid_out_as_mbridge_does(recorded, family):
    mapping, whole = compile_mapping(CONFIGS[family]), of(recorded, f"{family}/mcore/")
    hf = of(recorded, f"{family}/hf/")
    assert {name: array.shape for name, array in hf.items()} == dict(mapping.hf_tensors)
    assert {mapping.canonical_name(our_name(name)) for name in whole} == mapping.tensors.keys()
    boxes = [Box(our_name(name), (0,) * array.ndim, array.shape, array.shape) for name, array in whole.items()]
    for (name, array), ours in zip(whole.items(), filled(family, boxes, hf), strict=True):
        np.testing.assert_array_equal(ours, array, err_msg=name)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("family", CONFIGS)
def test_a_rank_of_two_holds_what_mbridge_gives_it(recorded, family, rank):
    """q, k, v and their bias by rows; the gate and the up rows each on their own; an expert's fc2 by columns."""
    whole, hf = of(recorded, f"{family}/mcore/"), of(recorded, f"{family}/hf/")
    cut = of(recorded, f"{family}/tp2/{rank}/")
    for name, array in cut.items():
        shape = whole[name].shape
        rows = shape[0] // 2
        if "linear_fc1" in name:
            offsets = [(rank * rows // 2, 0), (rows + rank * rows // 2, 0)]
            boxes = [Box(our_name(name), offset, (rows // 2, shape[1]), shape) for offset in offsets]
        elif "linear_fc2" in name:
            boxes = [Box(our_name(name), (0, rank * shape[1] // 2), (shape[0], shape[1] // 2), shape)]
        else:
            boxes = [Box(our_name(name), (rank * rows, *(0,) * (len(shape) - 1)), (rows, *shape[1:]), shape)]
        np.testing.assert_array_equal(np.concatenate(filled(family, boxes, hf)), array, err_msg=name)
    assert cut
