"""Records how mbridge lays out megatron-core tensors: tests/data/mbridge.npz, the oracle of tests/unit/test_weights_mbridge.py.

    uv pip install --target /tmp/mbridge --no-deps mbridge==0.15.1
    PYTHONPATH=/tmp/mbridge python tests/data/record_mbridge.py

Every HF tensor is filled with the ids of its elements; mbridge's own functions then name and lay out the megatron-core tensors, whole
and, where it has a rule of its own for it, cut over 2 tensor-parallel ranks. The file has all ids in a row, and an index of shapes:

    FAMILY/hf/NAME            ids of an HF tensor
    FAMILY/mcore/NAME         the megatron-core tensor
    FAMILY/tp2/RANK/NAME      what a rank of 2 holds
"""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from dapo_megatron.actor import cpu_adapter

cpu_adapter.install()  # mbridge imports megatron-core

from mbridge.models.deepseek_v3 import DeepseekV3Bridge
from mbridge.models.llama import LLaMABridge
from mbridge.models.mixtral import MixtralBridge
from mbridge.models.qwen2 import Qwen2Bridge
from mbridge.models.qwen3 import Qwen3Bridge
from mbridge.models.qwen3moe import Qwen3MoEBridge

DENSE = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "vocab_size": 10,
}
H, F, A, G, D, V = (DENSE[name] for name in list(DENSE)[:2] + list(DENSE)[3:])
EXPERTS, WIDTH = 4, 6
LATENT = {"q": 5, "kv": 6, "plain": 4, "rotary": 2, "value": 3}
FUSED_FC1 = "mlp.linear_fc1.layer_norm_weight"

QKV = {"q_proj.weight": (A * D, H), "k_proj.weight": (G * D, H), "v_proj.weight": (G * D, H), "o_proj.weight": (H, A * D)}
QKV_BIAS = {"q_proj.bias": (A * D,), "k_proj.bias": (G * D,), "v_proj.bias": (G * D,)}
QK_NORM = {"q_norm.weight": (D,), "k_norm.weight": (D,)}
HEAD = LATENT["plain"] + LATENT["rotary"]
MLA = {
    "q_a_proj.weight": (LATENT["q"], H),
    "q_a_layernorm.weight": (LATENT["q"],),
    "q_b_proj.weight": (A * HEAD, LATENT["q"]),
    "kv_a_proj_with_mqa.weight": (LATENT["kv"] + LATENT["rotary"], H),
    "kv_a_layernorm.weight": (LATENT["kv"],),
    "kv_b_proj.weight": (A * (LATENT["plain"] + LATENT["value"]), LATENT["kv"]),
    "o_proj.weight": (H, A * LATENT["value"]),
}


def mlp(prefix: str, width: int, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")) -> dict:
    gate, up, down = (f"{prefix}.{name}.weight" for name in names)
    return {gate: (width, H), up: (width, H), down: (H, width)}


def experts(prefix: str, *names: str) -> dict:
    shapes = {f"{prefix}.gate.weight": (EXPERTS, H)}
    for expert in range(EXPERTS):
        shapes |= mlp(f"{prefix}.experts.{expert}", WIDTH, names or ("gate_proj", "up_proj", "down_proj"))
    return shapes


def hf_shapes(attention: dict, mlp_of_layer: list[dict]) -> dict[str, tuple[int, ...]]:
    shapes = {"model.embed_tokens.weight": (V, H), "model.norm.weight": (H,), "lm_head.weight": (V, H)}
    for layer, of_mlp in enumerate(mlp_of_layer):
        of_layer = {f"self_attn.{name}": shape for name, shape in attention.items()} | of_mlp
        of_layer |= {"input_layernorm.weight": (H,), "post_attention_layernorm.weight": (H,)}
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in of_layer.items()}
    return shapes


DENSE_MLP = mlp("mlp", F)
SHARED = mlp("mlp.shared_experts", WIDTH) | {"mlp.gate.e_score_correction_bias": (EXPERTS,)}
FAMILIES = {
    "llama": (LLaMABridge, hf_shapes(QKV, [DENSE_MLP] * 2)),
    "qwen2": (Qwen2Bridge, hf_shapes(QKV | QKV_BIAS, [DENSE_MLP] * 2)),
    "qwen3": (Qwen3Bridge, hf_shapes(QKV | QK_NORM, [DENSE_MLP] * 2)),
    "qwen3_moe": (Qwen3MoEBridge, hf_shapes(QKV | QK_NORM, [experts("mlp")] * 2)),
    "mixtral": (MixtralBridge, hf_shapes(QKV, [experts("block_sparse_moe", "w1", "w3", "w2")] * 2)),
    "deepseek_v3": (DeepseekV3Bridge, hf_shapes(MLA, [DENSE_MLP, experts("mlp") | SHARED])),
}


def mcore_names(bridge_class: type, hf_names: set[str]) -> list[str]:
    """mbridge's names: its tables, with layers and experts filled in, where the HF tensors exist."""
    names = list(bridge_class._DIRECT_MAPPING)
    for layer in range(2):
        for table in (bridge_class._ATTENTION_MAPPING, bridge_class._MLP_MAPPING):
            for ending, patterns in table.items():
                ending = {"pre_mlp_layernorm": "pre_mlp_layernorm.weight"}.get(ending, ending)
                is_expert = "{expert_id}" in patterns[0]
                for expert in range(EXPERTS) if is_expert else [0]:
                    if patterns[0].format(layer_number=layer, expert_id=expert) in hf_names:
                        number = str(expert) if is_expert else ""
                        ending_of = ending if ".weight" in ending or not is_expert else f"{ending}.weight"
                        names.append(f"decoder.layers.{layer}.{ending_of}{number}")
    norms = [FUSED_FC1, "pre_mlp_layernorm.weight"]  # one HF tensor under two names: as the layer has it
    for layer in range(2):
        present = [f"decoder.layers.{layer}.{norm}" for norm in norms if f"decoder.layers.{layer}.{norm}" in names]
        if len(present) == 2:
            has_dense_mlp = f"model.layers.{layer}.mlp.gate_proj.weight" in hf_names
            names.remove(present[1] if has_dense_mlp else present[0])
    return names


def record(family: str) -> dict[str, np.ndarray]:
    bridge_class, shapes = FAMILIES[family]
    bridge = object.__new__(bridge_class)
    bridge.hf_config = SimpleNamespace(**DENSE, num_experts=EXPERTS)
    bridge.config = SimpleNamespace(gated_linear_unit=True, mtp_num_layers=None, num_layers=2, num_moe_experts=EXPERTS)
    bridge.mpu = SimpleNamespace(tp_size=2, etp_size=2)
    bridge.dtype = bridge.make_vocab_size_divisible_by = None
    ids = count(1)
    hf = {name: torch.tensor([next(ids) for _ in range(np.prod(shape))]).reshape(shape) for name, shape in shapes.items()}
    arrays = {f"{family}/hf/{name}": tensor for name, tensor in hf.items()}
    for name in mcore_names(bridge_class, set(hf)):
        whole = bridge._weight_to_mcore_format(name, [hf[hf_name] for hf_name in bridge._weight_name_mapping_mcore_to_hf(name)])
        arrays[f"{family}/mcore/{name}"] = whole
        if "layer_norm" not in name and ("linear_qkv." in name or "linear_fc1." in name or "mlp.experts.linear_fc2." in name):
            for rank, part in enumerate(bridge._weight_split_across_tp(name, whole, None, 2)):
                arrays[f"{family}/tp2/{rank}/{name}"] = part
    return {key: tensor.numpy().astype(np.uint16) for key, tensor in arrays.items()}


if __name__ == "__main__":
    recorded = {key: array for family in FAMILIES for key, array in record(family).items()}
    index, ids = {key: array.shape for key, array in recorded.items()}, [array.ravel() for array in recorded.values()]
    np.savez_compressed(Path(__file__).with_name("mbridge.npz"), index=json.dumps(index), ids=np.concatenate(ids))
