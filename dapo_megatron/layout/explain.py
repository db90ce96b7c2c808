"""Which layouts a person means by `tp=4,pp=2`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from dapo_megatron.config.fields import did_you_mean, nearest
from dapo_megatron.layout.layout import Layout
from dapo_megatron.types import ConfigError

SIZES: Mapping[str, Callable[[Layout], str]] = {
    "tp": lambda layout: str(layout.tensor_parallel_size),
    "pp": lambda layout: str(layout.pipeline_parallel_size),
    "vpp": lambda layout: str(layout.num_chunks),
    "cp": lambda layout: str(layout.context_parallel_size),
    "ep": lambda layout: str(layout.expert_parallel_size),
    "etp": lambda layout: str(layout.expert_tensor_parallel_size),
    "dp": lambda layout: str(layout.data_parallel_size),
    "tokens": lambda layout: str(layout.max_tokens_per_micro_batch),
    "recompute": lambda layout: layout.recompute.granularity,
    "first": lambda layout: str(layout.num_layers_in_first_pipeline_stage),
    "last": lambda layout: str(layout.num_layers_in_last_pipeline_stage),
    "engine_tp": lambda layout: str(layout.engine.tensor_parallel_size) if layout.engine else "none",
}
"""How each size is told, by its name in --explain."""


OF_CUTS = frozenset({"tp", "pp", "vpp", "cp", "ep", "etp", "dp", "first", "last"})
"""Sizes that a cut of the model has before micro-batches, recompute and engines are chosen."""


def parse_sizes(text: str) -> dict[str, str]:
    """`tp=4,pp=2` -> {"tp": "4", "pp": "2"}. ConfigError for an unknown name or a part without a value."""
    wanted = {}
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not value:
            raise ConfigError(f"--explain ({text}): {part or 'nothing'} must be NAME=VALUE, e.g. tp=4,pp=2; correct it.")
        if name not in SIZES:
            hint = did_you_mean(nearest(name, SIZES)) or "."
            raise ConfigError(f"--explain ({text}): {name} must be one of {', '.join(SIZES)}{hint}")
        wanted[name] = value
    return wanted


def matching(layout: Layout, wanted: Mapping[str, str]) -> bool:
    """Whether a layout has all of these sizes."""
    return all(SIZES[name](layout) == value for name, value in wanted.items())


def cut_matching(cut: Layout, wanted: Mapping[str, str]) -> bool:
    """Whether a layout of this cut can have all of these sizes."""
    return matching(cut, {name: value for name, value in wanted.items() if name in OF_CUTS})
