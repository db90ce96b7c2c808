"""What a file of HF weights holds and where: read from its header, without reading weights."""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

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
            with safe_open(path, framework="numpy"):  # checks the header against itself and the size of the file
                pass
            length = int.from_bytes(content.read(8), "little")
            header = json.loads(content.read(length))
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise CheckpointError(f"{path} cannot be read ({reason}); get the file again") from error
    return {
        name: HfTensor(tuple(entry["shape"]), entry["dtype"], file, 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
        if name != "__metadata__"
    }


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
