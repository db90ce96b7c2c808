"""Arithmetic at the leaves of the mapping: weights that the files hold in another form than the model.

One codec: FP8 with a scale a block, as DeepSeek-V3 publishes (`quantization_config.quant_method: fp8`). Beside a weight [rows,
columns] in e4m3 lies `NAME_scale_inv`, fp32 [ceil(rows / block), ceil(columns / block)]: the factor of each block of 128 x 128.
It is read into bf16 (the product in fp32, rounded once), so any slice decodes by itself, wherever it cuts blocks. It is written with
the largest element of each block at the end of e4m3's range, so a slice of whole blocks encodes by itself.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dapo_megatron.types import MappingError

if TYPE_CHECKING:
    import torch

FP8 = "F8_E4M3"
"""As safetensors writes the dtype."""
_SCALE_ENDING = "_scale_inv"

Block = tuple[int, int]
"""Rows and columns that share a scale."""


@dataclass(frozen=True, slots=True)
class Fp8Codec:
    """How a server that serves an FP8 model wants its weights."""

    block: Block
    names: frozenset[str]
    """HF names of the weights that are quantised; each is followed by its scales."""
    powers_of_two: bool = False
    """Scales are powers of two (`quantization_config.scale_fmt: ue8m0`)."""


def fp8_codec(hf_config: Mapping[str, Any], tensor_names: Collection[str]) -> Fp8Codec | None:
    """That of the model whose files hold `tensor_names`; None for an unquantised one. MappingError for any other quantisation."""
    block = block_of(hf_config)
    if block is None:
        return None
    names = frozenset(name for name in tensor_names if scale_name(name) in tensor_names)
    return Fp8Codec(block, names, hf_config["quantization_config"].get("scale_fmt") == "ue8m0")


def block_of(hf_config: Mapping[str, Any]) -> Block | None:
    """The block of an FP8 model, None for an unquantised one. MappingError for any other quantisation."""
    quantization = hf_config.get("quantization_config")
    if not quantization:
        return None
    block = quantization.get("weight_block_size")
    known = quantization.get("quant_method") == "fp8" and quantization.get("fmt", "e4m3") == "e4m3"
    if not known or not isinstance(block, list) or len(block) != 2:
        described = {key: quantization.get(key) for key in ("quant_method", "fmt", "weight_block_size")}
        raise MappingError(
            f"quantization_config ({described}) must be absent, or fp8 in e4m3 with a weight_block_size; use the unquantised model"
        )
    return int(block[0]), int(block[1])


def scale_name(name: str) -> str:
    """The tensor that holds the scales of an FP8 weight."""
    return name + _SCALE_ENDING


def scale_shape(shape: tuple[int, ...], block: Block) -> tuple[int, int]:
    """Its shape, for a weight [rows, columns]."""
    rows, columns = shape
    return -(-rows // block[0]), -(-columns // block[1])


def scale_slices(slices: tuple[slice, ...], block: Block) -> tuple[slice, slice]:
    """The scales that a slice of the weight needs."""
    rows, columns = (slice(part.start // size, -(-part.stop // size)) for part, size in zip(slices, block, strict=True))
    return rows, columns


def dequantise(weight: torch.Tensor, scales: torch.Tensor, slices: tuple[slice, ...], block: Block) -> torch.Tensor:
    """bf16 [rows, columns] of a slice: `weight` is weight[slices] in e4m3, `scales` is scales[scale_slices(slices)] in fp32."""
    import torch

    for axis, (part, size) in enumerate(zip(slices, block, strict=True)):
        first = part.start % size
        scales = scales.repeat_interleave(size, dim=axis).narrow(axis, first, part.stop - part.start)
    return (weight.to(torch.float32) * scales).to(torch.bfloat16)


def quantise(weight: torch.Tensor, block: Block, *, powers_of_two: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 of a weight [rows, columns], and its scales in fp32, of `scale_shape`. A block of zeros has scale 1.

    `powers_of_two` rounds scales up to the next one.

    An element comes back from `dequantise` with a relative error of at most 2**-4, and an absolute one of half a step (2**-10) of its
    block's scale where it is small, before the rounding to bf16.
    """
    import torch

    rows, columns = weight.shape
    scale_rows, scale_columns = scale_shape((rows, columns), block)
    padded = torch.zeros(scale_rows * block[0], scale_columns * block[1], dtype=torch.float32, device=weight.device)
    padded[:rows, :columns] = weight
    blocks = padded.view(scale_rows, block[0], scale_columns, block[1])
    largest = blocks.abs().amax(dim=(1, 3))
    scales = torch.where(largest > 0, largest / torch.finfo(torch.float8_e4m3fn).max, 1.0)
    if powers_of_two:
        mantissa, exponent = torch.frexp(scales)
        scales = torch.ldexp(torch.ones_like(scales), torch.where(mantissa > 0.5, exponent, exponent - 1))
    encoded = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
    return encoded.reshape(padded.shape)[:rows, :columns].contiguous(), scales
