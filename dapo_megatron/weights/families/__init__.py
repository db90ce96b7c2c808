"""The model families by HF `model_type`. A new family is one file with a table, and one entry here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dapo_megatron.types import MappingError
from dapo_megatron.weights.families.dense import Family
from dapo_megatron.weights.families.llama import LLAMA
from dapo_megatron.weights.families.qwen2 import QWEN2
from dapo_megatron.weights.families.qwen3 import QWEN3

FAMILIES: dict[str, Family] = {family.model_type: family for family in (LLAMA, QWEN2, QWEN3)}


def family_of(hf_config: Mapping[str, Any]) -> Family:
    """The family of a config.json. MappingError for an unknown `model_type` and for fields that change the set of tensors."""
    model_type = hf_config.get("model_type")
    if model_type not in FAMILIES:
        raise MappingError(
            f"model_type ({model_type!r}) must be one of {', '.join(sorted(FAMILIES))}; add a table in weights/families"
        )
    family = FAMILIES[model_type]
    for name in family.must_be_off:
        if hf_config.get(name):
            raise MappingError(
                f"{name} ({hf_config[name]!r}) must be false for model_type {model_type!r}; its table has no such biases"
            )
    if hf_config.get("quantization_config"):
        raise MappingError("quantization_config must be absent: quantised tensors are not mapped; use the unquantised model")
    return family


def with_defaults(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json with what transformers assumes for missing and null fields. Errors as `family_of`."""
    return {**family_of(hf_config).defaults, **{key: value for key, value in hf_config.items() if value is not None}}
