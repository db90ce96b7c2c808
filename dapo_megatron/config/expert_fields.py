"""What config.json says about experts, in the names of each model type."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Config = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ExpertFields:
    """The fields of one model type."""

    numbers: tuple[str, ...]
    """Names of the number of experts: that of the files, then that of newer transformers."""
    width_field: str
    """Of one expert."""

    def number(self, hf_config: Config) -> int | None:
        """How many experts a layer has; None where the file does not say."""
        return _size(next((hf_config[name] for name in self.numbers if name in hf_config), None))

    def width(self, hf_config: Config) -> int | None:
        """Rows of an expert's gate; None where the file does not say."""
        return _size(hf_config.get(self.width_field))

    def has_dense_layers(self, hf_config: Config) -> bool:
        """Whether some layers have an MLP of intermediate_size instead of experts."""
        return (
            any(hf_config.get(name) for name in ("mlp_only_layers", "first_k_dense_replace"))
            or hf_config.get("decoder_sparse_step", 1) != 1
        )


EXPERT_FIELDS = {
    "qwen3_moe": ExpertFields(("num_experts", "num_local_experts"), "moe_intermediate_size"),
    "mixtral": ExpertFields(("num_local_experts", "num_experts"), "intermediate_size"),
    "deepseek_v2": ExpertFields(("n_routed_experts", "num_experts"), "moe_intermediate_size"),
    "deepseek_v3": ExpertFields(("n_routed_experts", "num_local_experts"), "moe_intermediate_size"),
}
"""By `model_type`."""


def _size(value: object) -> int | None:
    return value if isinstance(value, int) and value > 0 else None
