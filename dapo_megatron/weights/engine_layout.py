"""What each tensor-parallel rank of a server holds of a model: HF tensors cut and put together into its own tensors.

A table like the families', read in one direction only: it says what an engine must hold after a sync, so that hashes made by the
sender can be compared with the engine's own. The layout is that of unquantised models in SGLang 0.5.23.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dapo_megatron.types import MappingError
from dapo_megatron.weights.families import family_of, with_defaults
from dapo_megatron.weights.plan import ModelMapping

KNOWN_MODEL_TYPES = ("llama", "qwen2", "qwen3", "qwen3_moe", "mixtral")
VOCABULARY_MULTIPLE = 64
"""Rows of embedding and LM head are padded with zeros to a multiple of this (times the ranks, where they do not divide it)."""

CPU_WIDTH_MULTIPLE = 32
"""MLPs of engines on CPUs are padded to a multiple of this on each rank."""

Cut = Literal["whole", "rows", "key_value_rows", "columns", "vocabulary"]


@dataclass(frozen=True, slots=True)
class EnginePart:
    """`hf_name[slices]`, row-major."""

    hf_name: str
    slices: tuple[slice, ...]


@dataclass(frozen=True, slots=True)
class EngineTensor:
    """A tensor of one engine rank: its parts one after the other, in the order they are sent, then zeros."""

    name: str
    parts: tuple[EnginePart, ...]
    num_zeros: int = 0

    @property
    def num_elements(self) -> int:
        """Of all parts and the zeros."""
        return sum(math.prod(axis.stop - axis.start for axis in part.slices) for part in self.parts) + self.num_zeros


@dataclass(frozen=True, slots=True)
class _Line:
    """HF names that match `pattern` are cut by `cut` and lie in the engine tensor `name` (a template of the match)."""

    pattern: str
    name: str
    cut: Cut


_TABLE = (
    _Line(r"(model\.embed_tokens|lm_head)\.weight", r"\1.weight", "vocabulary"),
    _Line(r"(.*\.self_attn)\.q_proj\.(weight|bias)", r"\1.qkv_proj.\2", "rows"),
    _Line(r"(.*\.self_attn)\.[kv]_proj\.(weight|bias)", r"\1.qkv_proj.\2", "key_value_rows"),
    _Line(r"(.*\.self_attn\.o_proj\.weight)", r"\1", "columns"),
    _Line(r"(.*\.mlp)\.(?:gate|up)_proj\.weight", r"\1.gate_up_proj.weight", "rows"),
    _Line(r"(.*\.mlp\.down_proj\.weight)", r"\1", "columns"),
    _Line(r"(.*\.mlp\.experts)\.\d+\.(?:gate|up)_proj\.weight", r"\1.w13_weight", "rows"),
    _Line(r"(.*\.mlp\.experts)\.\d+\.down_proj\.weight", r"\1.w2_weight", "columns"),
    _Line(r"(.*\.block_sparse_moe\.experts)\.\d+\.w[13]\.weight", r"\1.w13_weight", "rows"),
    _Line(r"(.*\.block_sparse_moe\.experts)\.\d+\.w2\.weight", r"\1.w2_weight", "columns"),
    _Line(r"(.*\.(?:mlp|block_sparse_moe)\.gate\.weight)", r"\1", "whole"),
    _Line(r"(.*norm\.weight)", r"\1", "whole"),
)


def engine_layout(
    mapping: ModelMapping, hf_config: Mapping[str, Any], tensor_parallel_size: int, device: Literal["cpu", "cuda"]
) -> tuple[tuple[EngineTensor, ...], ...]:
    """The tensors of each rank of an engine, in rank order.

    MappingError for a model type whose layout is not known, and for a tensor that the ranks cannot share or that SGLang would pad.
    """
    model_type = family_of(hf_config).model_type
    if model_type not in KNOWN_MODEL_TYPES:
        raise MappingError(
            f"model_type ({model_type}) must be one of {', '.join(KNOWN_MODEL_TYPES)} for an SGLang engine whose weights are "
            "checked after each sync; add its layout to weights/engine_layout.py"
        )
    config = with_defaults(hf_config, family_of(hf_config))
    if device == "cpu" and tensor_parallel_size > 1:
        _check_widths(config, tensor_parallel_size)
    num_heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    return tuple(
        tuple(_tensors_of_rank(mapping, int(num_heads), tensor_parallel_size, rank)) for rank in range(tensor_parallel_size)
    )


def _check_widths(config: Mapping[str, Any], ranks: int) -> None:
    for name in ("intermediate_size", "moe_intermediate_size"):
        width = config.get(name)
        if width is not None and width % (ranks * CPU_WIDTH_MULTIPLE):
            raise MappingError(
                f"{name} ({width}) must be a multiple of {ranks * CPU_WIDTH_MULTIPLE} for an engine of tensor_parallel_size {ranks} on "
                "CPUs: SGLang would pad it, and weights could not be checked; use rollout.engine.tensor_parallel_size 1"
            )


def _tensors_of_rank(mapping: ModelMapping, num_key_value_heads: int, ranks: int, rank: int) -> Iterator[EngineTensor]:
    parts: dict[str, list[EnginePart]] = {}
    num_zeros: dict[str, int] = {}
    for hf_name, shape in mapping.hf_tensors.items():
        line, name = _line_of(hf_name)
        if line.cut == "vocabulary":
            slices, zero_rows = _vocabulary_rows(shape, ranks, rank)
            num_zeros[name] = zero_rows * math.prod(shape[1:])
        elif line.cut == "key_value_rows":
            copies = max(1, ranks // num_key_value_heads)
            slices = _share(hf_name, shape, 0, ranks // copies, rank // copies)
        elif line.cut == "whole":
            slices = tuple(slice(0, size) for size in shape)
        else:
            slices = _share(hf_name, shape, 1 if line.cut == "columns" else 0, ranks, rank)
        parts.setdefault(name, []).append(EnginePart(hf_name, slices))
    for name, of_tensor in parts.items():
        yield EngineTensor(name, tuple(of_tensor), num_zeros.get(name, 0))


def _line_of(hf_name: str) -> tuple[_Line, str]:
    for line in _TABLE:
        match = re.fullmatch(line.pattern, hf_name)
        if match:
            return line, match.expand(line.name)
    raise MappingError(f"{hf_name} has no line in the table of engine tensors; add it to weights/engine_layout.py")


def _share(hf_name: str, shape: tuple[int, ...], axis: int, ranks: int, rank: int) -> tuple[slice, ...]:
    size, rest = divmod(shape[axis], ranks)
    if rest:
        raise MappingError(
            f"rollout.engine.tensor_parallel_size must divide {hf_name} {shape} along axis {axis} into equal shares, {ranks} does not; "
            "use a divisor"
        )
    return tuple(slice(rank * size, (rank + 1) * size) if i == axis else slice(0, length) for i, length in enumerate(shape))


def _vocabulary_rows(shape: tuple[int, ...], ranks: int, rank: int) -> tuple[tuple[slice, ...], int]:
    """The rank's rows of the vocabulary, and how many rows of zeros follow."""
    multiple = VOCABULARY_MULTIPLE
    if -(-shape[0] // multiple) * multiple % ranks:
        multiple *= ranks
    rows = -(-shape[0] // multiple) * multiple // ranks
    start, stop = (min(row, shape[0]) for row in (rank * rows, (rank + 1) * rows))
    return (slice(start, stop), *(slice(0, size) for size in shape[1:])), rows - (stop - start)
