"""Shapes of published models by the names that tables of results give them (`data/public_models.yaml`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from dapo_megatron.layout.model_shape import ModelShape

DATA = Path(__file__).parent / "data"
_STYLES: Mapping[str, Mapping[str, Any]] = {
    "llama": {"swiglu": True, "normalization": "RMSNorm", "add_bias_linear": False},
    "gpt": {"swiglu": False, "normalization": "LayerNorm", "add_bias_linear": True},
    "nemotron": {"swiglu": False, "normalization": "LayerNorm", "add_bias_linear": False},
}
_DECORATION = re.compile(r"(?<![a-z0-9])(meta|hf|base|chat|instruct|thinking|pretrain|sft)(?![a-z0-9])")
"""Words around a name that say nothing about the shape."""
_LATENT_DEFAULTS = {"qk_head_dim": 128, "qk_pos_emb_head_dim": 64, "v_head_dim": 128}


def shape_of(entry: Mapping[str, Any], num_layers: int | None = None) -> ModelShape:
    """An entry of the tables as a shape, cut to `num_layers` where they are fewer."""
    layers = num_layers or entry["num_layers"]
    dense = entry.get("dense_layers", 0)
    arguments = {**_STYLES[entry.get("style", "llama")], **entry, "num_layers": layers}
    arguments["untie_embeddings_and_output_weights"] = not entry.get("tied", False)
    if "kv_lora_rank" in entry:
        arguments |= {"multi_latent_attention": True, **_LATENT_DEFAULTS}
    if "num_experts" in entry:
        arguments["moe_layer_freq"] = [int(layer >= dense) for layer in range(layers)]
    return ModelShape.from_megatron(arguments)


def find_model(name: str, framework: str) -> Mapping[str, Any] | None:
    """The entry whose name a row gives; one of the row's own framework comes first. None for an unknown model."""
    wanted = re.sub(r"[^a-z0-9]", "", _DECORATION.sub("", name.lower()))
    found = [entry for entry in _entries() if any(re.fullmatch(pattern, wanted) for pattern in entry["names"])]
    own = [entry for entry in found if entry.get("framework") == framework]
    common = [entry for entry in found if "framework" not in entry]
    return next(iter(own + common), None)


@cache
def _entries() -> list[dict[str, Any]]:
    return yaml.safe_load((DATA / "public_models.yaml").read_text(encoding="utf-8"))
