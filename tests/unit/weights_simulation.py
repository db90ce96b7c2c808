"""An independent oracle for the weights tests: HF tensors of ids, and megatron-core ranks cut from them by plain tensor algebra.

It shares nothing with `dapo_megatron.weights` but the `Box` record: shapes are spelled out, qkv is built by reshape and
concatenate, ranks by `np.split`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dapo_megatron.weights.plan import Box

LLAMA_TIED = {
    "model_type": "llama",
    "hidden_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "vocab_size": 21,
    "tie_word_embeddings": True,
}
LLAMA_UNTIED = LLAMA_TIED | {"num_attention_heads": 8, "tie_word_embeddings": False, "vocab_size": 32, "num_hidden_layers": 4}
QWEN2 = LLAMA_TIED | {"model_type": "qwen2", "num_attention_heads": 8, "tie_word_embeddings": False}
QWEN3 = QWEN2 | {"model_type": "qwen3", "head_dim": 6, "tie_word_embeddings": True}
CONFIGS = {"llama_tied": LLAMA_TIED, "llama_untied": LLAMA_UNTIED, "qwen2": QWEN2, "qwen3": QWEN3}


@dataclass(frozen=True)
class Piece:
    """A box of a simulated rank, what it must hold (padding: 0), and whether the rank owns it or holds a replica."""

    box: Box
    expected: np.ndarray
    owned: bool


def identity_fill(config: dict) -> dict[str, np.ndarray]:
    """HF tensors (int64) in which every element of the model has its own id, from 1 on."""
    tensors, next_id = {}, 1
    for name, shape in _hf_shapes(config).items():
        tensors[name] = np.arange(next_id, next_id + np.prod(shape)).reshape(shape)
        next_id += np.prod(shape)
    return tensors


def simulate_ranks(config: dict, hf: dict[str, np.ndarray], tp: int, pp: int = 1, vocab_multiple: int = 1) -> list[list[Piece]]:
    """The pieces of each rank, TP fastest. `num_hidden_layers` must divide by `pp`."""
    num_layers = config["num_hidden_layers"] // pp
    return [
        [
            *(_embedding(config, hf, tp, tp_rank, vocab_multiple) if stage == 0 else []),
            *(
                piece
                for layer in range(stage * num_layers, (stage + 1) * num_layers)
                for piece in _layer(config, hf, layer, tp, tp_rank)
            ),
            *(_head(config, hf, tp, tp_rank, vocab_multiple, first_stage=stage == 0) if stage == pp - 1 else []),
        ]
        for stage in range(pp)
        for tp_rank in range(tp)
    ]


def owned_boxes(ranks: list[list[Piece]]) -> list[list[Box]]:
    return [[piece.box for piece in rank if piece.owned] for rank in ranks]


def _hf_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    hidden, width, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim", hidden // heads)
    q_rows, kv_rows = heads * head_dim, config["num_key_value_heads"] * head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for part, rows in (("q", q_rows), ("k", kv_rows), ("v", kv_rows)):
            shapes[f"{prefix}self_attn.{part}_proj.weight"] = (rows, hidden)
            if config["model_type"] == "qwen2":
                shapes[f"{prefix}self_attn.{part}_proj.bias"] = (rows,)
        if config["model_type"] == "qwen3":
            shapes[f"{prefix}self_attn.q_norm.weight"] = shapes[f"{prefix}self_attn.k_norm.weight"] = (head_dim,)
        shapes[f"{prefix}self_attn.o_proj.weight"] = (hidden, q_rows)
        shapes[f"{prefix}mlp.gate_proj.weight"] = shapes[f"{prefix}mlp.up_proj.weight"] = (width, hidden)
        shapes[f"{prefix}mlp.down_proj.weight"] = (hidden, width)
        shapes[f"{prefix}input_layernorm.weight"] = shapes[f"{prefix}post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def _embedding(config: dict, hf: dict, tp: int, tp_rank: int, vocab_multiple: int, owned: bool = True) -> list[Piece]:
    padded = _pad_rows(hf["model.embed_tokens.weight"], vocab_multiple)
    return [_split("embedding.word_embeddings.weight", padded, 0, tp, tp_rank, owned)]


def _head(config: dict, hf: dict, tp: int, tp_rank: int, vocab_multiple: int, first_stage: bool) -> list[Piece]:
    norm = _replicated("decoder.final_layernorm.weight", hf["model.norm.weight"], tp_rank)
    if not config["tie_word_embeddings"]:
        padded = _pad_rows(hf["lm_head.weight"], vocab_multiple)
        return [norm, _split("output_layer.weight", padded, 0, tp, tp_rank)]
    # A tied last stage holds a copy of the embedding; the first stage owns it.
    return [norm] if first_stage else [norm, *_embedding(config, hf, tp, tp_rank, vocab_multiple, owned=False)]


def _layer(config: dict, hf: dict, layer: int, tp: int, tp_rank: int) -> list[Piece]:
    source, prefix, groups = f"model.layers.{layer}.", f"decoder.layers.{layer}.", config["num_key_value_heads"]
    pieces = [
        _replicated(f"{prefix}input_layernorm.weight", hf[f"{source}input_layernorm.weight"], tp_rank),
        _split(f"{prefix}self_attention.linear_qkv.weight", _qkv(hf, source, "weight", groups), 0, tp, tp_rank),
        _split(f"{prefix}self_attention.linear_proj.weight", hf[f"{source}self_attn.o_proj.weight"], 1, tp, tp_rank),
        _replicated(f"{prefix}pre_mlp_layernorm.weight", hf[f"{source}post_attention_layernorm.weight"], tp_rank),
        *_gated(
            f"{prefix}mlp.linear_fc1.weight", hf[f"{source}mlp.gate_proj.weight"], hf[f"{source}mlp.up_proj.weight"], tp, tp_rank
        ),
        _split(f"{prefix}mlp.linear_fc2.weight", hf[f"{source}mlp.down_proj.weight"], 1, tp, tp_rank),
    ]
    if config["model_type"] == "qwen2":
        pieces.append(_split(f"{prefix}self_attention.linear_qkv.bias", _qkv(hf, source, "bias", groups), 0, tp, tp_rank))
    if config["model_type"] == "qwen3":
        for part in "qk":
            name = f"{prefix}self_attention.{part}_layernorm.weight"
            pieces.append(_replicated(name, hf[f"{source}self_attn.{part}_norm.weight"], tp_rank))
    return pieces


def _qkv(hf: dict, source: str, kind: str, groups: int) -> np.ndarray:
    q, k, v = (hf[f"{source}self_attn.{part}_proj.{kind}"] for part in "qkv")
    by_group = [x.reshape(groups, -1, *x.shape[1:]) for x in (q, k, v)]
    return np.concatenate(by_group, axis=1).reshape(-1, *q.shape[1:])


def _gated(name: str, gate: np.ndarray, up: np.ndarray, tp: int, tp_rank: int) -> list[Piece]:
    """Two boxes: a rank's fc1 holds its share of the gate rows, then its share of the up rows."""
    rows = gate.shape[0] // tp
    global_shape = (2 * gate.shape[0], gate.shape[1])
    return [
        Piece(
            Box(name, (start + tp_rank * rows, 0), (rows, gate.shape[1]), global_shape),
            np.split(half, tp)[tp_rank],
            owned=True,
        )
        for start, half in ((0, gate), (gate.shape[0], up))
    ]


def _split(name: str, full: np.ndarray, axis: int, tp: int, tp_rank: int, owned: bool = True) -> Piece:
    expected = np.split(full, tp, axis=axis)[tp_rank]
    offset = tuple(tp_rank * expected.shape[axis] if axis == i else 0 for i in range(full.ndim))
    return Piece(Box(name, offset, expected.shape, full.shape), expected, owned)


def _replicated(name: str, full: np.ndarray, tp_rank: int) -> Piece:
    return Piece(Box(name, (0,) * full.ndim, full.shape, full.shape), full, owned=tp_rank == 0)


def _pad_rows(full: np.ndarray, multiple: int) -> np.ndarray:
    return np.pad(full, ((0, -full.shape[0] % multiple), (0, 0)))
