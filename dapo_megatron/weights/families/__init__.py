"""The model families by HF `model_type`. A new family is one file with a table and a config map, and one entry here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dapo_megatron.types import MappingError
from dapo_megatron.weights.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from dapo_megatron.weights.families.family import Family
from dapo_megatron.weights.families.llama import LLAMA
from dapo_megatron.weights.families.mixtral import MIXTRAL
from dapo_megatron.weights.families.qwen2 import QWEN2
from dapo_megatron.weights.families.qwen3 import QWEN3
from dapo_megatron.weights.families.qwen3_moe import QWEN3_MOE

FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (LLAMA, QWEN2, QWEN3, QWEN3_MOE, MIXTRAL, DEEPSEEK_V2, DEEPSEEK_V3)
}


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
    return family


def with_defaults(hf_config: Mapping[str, Any], family: Family | None = None) -> dict[str, Any]:
    """The config.json with what transformers assumes for missing and null fields. Errors as `family_of`."""
    family = family or family_of(hf_config)
    given = {family.renamed_fields.get(key, key): value for key, value in hf_config.items() if value is not None}
    return {**family.defaults, **given}


def megatron_arguments(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """The config map: this model as Megatron-LM's arguments, by their names in its namespace. Errors as `family_of`.

    Architecture only, nothing about parallelism or training. `vocab_size` is without padding.
    """
    family = family_of(hf_config)
    return family.arguments(with_defaults(hf_config, family))
