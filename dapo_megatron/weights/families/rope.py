"""Rotary position embedding in config.json, in the spellings of transformers 4 and 5."""

from __future__ import annotations

from typing import Any

from dapo_megatron.types import MappingError
from dapo_megatron.weights.families.family import Arguments, Config


def rope_parameters(config: Config) -> dict[str, Any]:
    """`rope_type`, `rope_theta` and whatever the type needs.

    transformers 5 writes `rope_parameters`; older files have `rope_theta` and `rope_scaling` (with `type` or `rope_type`).
    """
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    rope["rope_type"] = rope.get("rope_type") or rope.pop("type", None) or "default"
    rope["rope_theta"] = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    return rope


def scaling_number(rope: dict[str, Any], name: str) -> float:
    """A number that the scaling cannot do without. MappingError when it is missing."""
    value = rope.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise MappingError(
            f"{name} ({value!r}) of rope_scaling must be a number: rope_type {rope['rope_type']!r} needs it; set it in config.json"
        )
    return value


def rope_arguments(config: Config) -> Arguments:
    """Megatron's arguments. It has one of the four numbers of `llama3` scaling; the others are constants there."""
    rope = rope_parameters(config)
    theta = rope["rope_theta"]
    llama3 = rope["rope_type"] == "llama3"
    return {
        "position_embedding_type": "rope",
        "rotary_percent": 1.0,
        "rotary_base": int(theta) if theta.is_integer() else theta,
        "use_rope_scaling": llama3,
        **({"rope_scaling_factor": float(scaling_number(rope, "factor"))} if llama3 else {}),
    }
