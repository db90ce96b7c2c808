"""What a file of HF weights holds and where: read from its header, without reading weights."""

from __future__ import annotations

import json
import math
import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dapo_megatron.types import CheckpointError

if TYPE_CHECKING:
    import torch

TORCH_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
"""dtype as safetensors writes it -> as torch names it."""
ITEMSIZE = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
}
"""Bytes of an element, by dtype as safetensors names it."""
_MAX_HEADER_BYTES = 100 * 2**20
"""As safetensors itself allows."""


@dataclass(frozen=True, slots=True)
class HfTensor:
    """Header of one tensor: `dtype` as safetensors writes it (F32, BF16, F16, ...), `file` within the directory.

    Its elements lie in the file row-major, from byte `offset` on.
    """

    shape: tuple[int, ...]
    dtype: str
    file: str
    offset: int


def read_header(directory: Path, file: str) -> dict[str, HfTensor]:
    """The tensors of a .safetensors file or of a .bin that torch.save wrote. CheckpointError when it is damaged."""
    return _safetensors(directory, file) if file.endswith(".safetensors") else _torch(directory, file)


def _safetensors(directory: Path, file: str) -> dict[str, HfTensor]:
    path = directory / file
    try:
        with path.open("rb") as content:
            size = os.fstat(content.fileno()).st_size
            length = int.from_bytes(content.read(8), "little")
            if length > min(size - 8, _MAX_HEADER_BYTES):
                raise ValueError("it is cut short, or is no safetensors file")
            header = json.loads(content.read(length))
        tensors = {name: _safetensors_tensor(file, 8 + length, entry) for name, entry in header.items() if name != "__metadata__"}
        _check_extents(tensors, 8 + length, size)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); get the file again") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error) if type(error) is ValueError else f"its header is damaged: {error!r}"
        raise CheckpointError(f"{path} cannot be read ({reason}); get the file again") from error
    return tensors


def _safetensors_tensor(file: str, start: int, entry: Any) -> HfTensor:
    shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
    if not all(isinstance(number, int) and number >= 0 for number in (*shape, begin, end)):
        raise TypeError(entry)
    return HfTensor(shape, entry["dtype"], file, start + begin)


def _check_extents(tensors: Mapping[str, HfTensor], start: int, size: int) -> None:
    """Raise ValueError unless the tensors lie one behind the other and fill the file."""
    at = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, math.prod(item[1].shape))):
        if tensor.dtype not in ITEMSIZE:
            raise ValueError(f"{name} has the dtype {tensor.dtype}, which is none of {', '.join(ITEMSIZE)}")
        if tensor.offset != at:
            raise ValueError(f"{name} starts at byte {tensor.offset}, the tensor before it ends at {at}")
        at += math.prod(tensor.shape) * ITEMSIZE[tensor.dtype]
        if at > size:
            raise ValueError(f"it ends within {name}: it is truncated")
    if at != size:
        raise ValueError(f"its tensors end at byte {at} of {size}")


def _torch(directory: Path, file: str) -> dict[str, HfTensor]:
    """Under fake tensors torch.load makes no storage, only says where each lies."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    path = directory / file
    try:
        with FakeTensorMode():
            state = torch.load(path, weights_only=True)
        size = path.stat().st_size
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than weights, and only weights are unpickled ({str(error).splitlines()[0]}); "
            "save the model as safetensors: save_pretrained"
        ) from error
    except (OSError, RuntimeError, EOFError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path} cannot be read ({reason}); get the file again") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, and must hold tensors by name; get the model's own file")
    return {name: _torch_tensor(path, file, size, name, tensor) for name, tensor in state.items()}


def _torch_tensor(path: Path, file: str, file_size: int, name: str, tensor: torch.Tensor) -> HfTensor:
    import torch

    names = {getattr(torch, torch_name): dtype for dtype, torch_name in TORCH_DTYPES.items()}
    if not isinstance(tensor, torch.Tensor) or tensor.dtype not in names or not tensor.is_contiguous():
        raise CheckpointError(
            f"{path}: {name} must be a contiguous tensor of numbers; save the model as safetensors: save_pretrained"
        )
    start = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if start is None:
        raise CheckpointError(f"{path} is in torch's format from before 1.6; save the model as safetensors: save_pretrained")
    offset = start + tensor.storage_offset() * tensor.itemsize
    if offset + tensor.numel() * tensor.itemsize > file_size:
        raise CheckpointError(f"{path} ends within {name}: it is truncated; get the file again")
    return HfTensor(tuple(tensor.shape), names[tensor.dtype], file, offset)
