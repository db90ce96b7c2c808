"""Where a transformers model in memory has the HF tensors of its files.

transformers 5 stacks the experts of a layer into two parameters when it reads them. A table like the families', read in one direction
only, says which; a stacked parameter holds its tensors one after the other, in the order they are sent, so each of them is a view of it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from torch import Tensor

from dapo_megatron.types import MappingError

_TABLE = (
    (r"(.*\.mlp\.experts)\.\d+\.(?:gate|up)_proj\.weight", r"\1.gate_up_proj"),
    (r"(.*\.mlp\.experts)\.\d+\.down_proj\.weight", r"\1.down_proj"),
    (r"(.*)\.block_sparse_moe\.experts\.\d+\.w[13]\.weight", r"\1.mlp.experts.gate_up_proj"),
    (r"(.*)\.block_sparse_moe\.experts\.\d+\.w2\.weight", r"\1.mlp.experts.down_proj"),
    (r"(.*)\.block_sparse_moe\.gate\.weight", r"\1.mlp.gate.weight"),
)
"""HF names that match the pattern lie in the tensor of that name; others have one of their own."""


def hf_views(held: Mapping[str, Tensor], hf_tensors: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The HF tensors of a model as views of what it holds, in the order of `hf_tensors` (`ModelMapping.hf_tensors`).

    `held` are its parameters and buffers by name. MappingError names a tensor that is missing or of another size.
    """
    parts: dict[str, list[str]] = {}
    for hf_name in hf_tensors:
        parts.setdefault(_name_in_memory(hf_name), []).append(hf_name)
    views: dict[str, Tensor] = {}
    for name, hf_names in parts.items():
        sizes = [math.prod(hf_tensors[hf_name]) for hf_name in hf_names]
        if name not in held or held[name].numel() != sum(sizes):
            found = f"of shape {tuple(held[name].shape)}" if name in held else "missing"
            raise MappingError(
                f"{name} must hold {', '.join(hf_names[:2])}{', ...' if len(hf_names) > 2 else ''} in {sum(sizes)} elements, but is {found} in "
                "transformers' model; add the model type's names to rollout/transformers_weights.py"
            )
        flat = held[name].detach().view(-1).split(sizes)
        views |= {hf_name: view.view(hf_tensors[hf_name]) for hf_name, view in zip(hf_names, flat, strict=True)}
    return {hf_name: views[hf_name] for hf_name in hf_tensors}


def _name_in_memory(hf_name: str) -> str:
    for pattern, name in _TABLE:
        match = re.fullmatch(pattern, hf_name)
        if match:
            return match.expand(name)
    return hf_name
