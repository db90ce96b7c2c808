"""Pickles inside checkpoints, read without running anything they name, and without torch.

A pickle can name any function to be called. Here a name is looked up in a closed table, and what stands there does nothing but keep
its arguments; the first name that is in no table is an error, before anything is called. `torch.load(weights_only=True)` does the same,
but takes seconds and half a gigabyte to import.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from checkpoint_tools.torch_archive import TorchArchive
from dapo_megatron.types import CheckpointError
from dapo_megatron.weights.hf_headers import TORCH_DTYPES

DTYPES = {torch_name: dtype for dtype, torch_name in TORCH_DTYPES.items()}
"""torch's name of a dtype -> safetensors'."""


class DtypeName(str):
    """torch's name of a dtype, where the dtype itself stands."""


class Record:
    """Stands for an object of a known class: its attributes, none of its methods."""

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        """As pickle would set it on the object: a dict of attributes, or what the class had its own way for."""
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.state = state


class Namespace(Record):
    """Stands for argparse.Namespace."""


class Inert(Record):
    """Stands for an object that is not needed."""

    def __setstate__(self, state: Any) -> None:
        """The state of what it stands for is dropped."""


class Metadata(Record):
    """The index of a torch_dist checkpoint."""

    state_dict_metadata: Mapping[str, Any]
    storage_data: Mapping[MetadataIndex, StorageInfo]


class TensorMetadata(Record):
    """Of one tensor."""

    properties: Any
    size: tuple[int, ...]
    chunks: list[Any]


class BytesMetadata(Record):
    """Of something that is no tensor."""


class MetadataIndex(Record):
    """A key of `storage_data`: a tensor's name and the offset of a chunk, or the name of something else."""

    fqn: str
    offset: tuple[int, ...] | None = None


class StorageInfo(Record):
    """A value of `storage_data`: bytes [offset, offset + length) of a file."""

    relative_path: str
    offset: int
    length: int
    transform_descriptors: Any = None


class TensorProperties(Record):
    """`dtype` as torch names it."""

    dtype: str

    def __setstate__(self, state: Any) -> None:
        """A tuple or dict, by the version of torch."""
        self.dtype = state["dtype"] if isinstance(state, dict) else state[0]


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as a torch file describes it: the record that has its elements, dtype (torch's name), offset and strides in elements."""

    record: str
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Storage:
    record: str
    dtype: str | None
    """None: the tensor says it."""


Allowed = Callable[[str, str], Any]
"""(module, name) -> what stands for it, None when it is not allowed."""


def load_index(data: bytes, what: str) -> Metadata:
    """The content of `.metadata`. CheckpointError when it is damaged or names anything else than what such an index is made of."""
    index = _load(data, what, _index_name)
    if not isinstance(index, Metadata):
        raise CheckpointError(
            f"{what} holds a {type(index).__name__}, must hold the index of a torch_dist checkpoint; get it again"
        )
    return index


def load_tensor_description(data: bytes, what: str) -> StoredTensor:
    """The content of `data.pkl` in a torch file that holds one tensor. Errors as `load_index`."""
    tensor = _load(data, what, _tensor_name)
    if not isinstance(tensor, StoredTensor):
        raise CheckpointError(f"{what} holds a {type(tensor).__name__}, must hold one tensor; get the checkpoint again")
    return tensor


def load_common(file: BinaryIO, what: str) -> Any:
    """A torch file of arguments and the like that Megatron-LM saves beside the tensors; tensors in it come out as `StoredTensor`.

    argparse.Namespace comes out as `Namespace`, objects of Megatron's own classes (enums, mostly) as `Inert`. CheckpointError
    names any other class.
    """
    return _load(TorchArchive(file, what).read("data.pkl"), what, _common_name)


def stored_tensors(value: Any, name: str) -> Iterator[tuple[str, StoredTensor]]:
    """The tensors somewhere in dicts and lists of what `load_common` gives, with their names joined to `name`."""
    if isinstance(value, StoredTensor):
        yield name, value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from stored_tensors(part, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            yield from stored_tensors(part, f"{name}.{index}")


class _Unpickler(pickle.Unpickler):
    """Looks up nothing but what is allowed."""

    def __init__(self, data: bytes, what: str, allowed: Allowed):
        super().__init__(io.BytesIO(data))
        self._what, self._allowed = what, allowed

    def find_class(self, module: str, name: str) -> Any:
        found = self._allowed(module, name)
        if found is None:
            raise CheckpointError(
                f"{self._what} names {module}.{name}, which no such file needs; it was not run: do not trust this checkpoint"
            )
        return found

    def persistent_load(self, pid: Any) -> _Storage:
        match pid:
            case ("storage", _StorageType() as kind, str(record), _, _):
                return _Storage(record, kind.dtype)
        raise pickle.UnpicklingError(f"reference {pid!r}")


def _load(data: bytes, what: str, allowed: Allowed) -> Any:
    try:
        return _Unpickler(data, what, allowed).load()
    except (
        *(pickle.UnpicklingError, AttributeError, EOFError, ImportError, IndexError),
        *(KeyError, MemoryError, OverflowError, TypeError, ValueError),
    ) as error:
        raise CheckpointError(f"{what} is damaged ({type(error).__name__}: {error}); get the checkpoint again") from error


@dataclass(frozen=True, slots=True)
class _StorageType:
    dtype: str | None


def _size(value: Any = ()) -> tuple[int, ...]:
    return tuple(value)


def _typed(storage: _Storage, offset: int, shape: Any, strides: Any, *_: object) -> StoredTensor:
    if storage.dtype is None:
        raise pickle.UnpicklingError("tensor without a dtype")
    return StoredTensor(storage.record, storage.dtype, offset, tuple(shape), tuple(strides))


def _untyped(
    storage: _Storage, offset: int, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: str, *_: object
) -> StoredTensor:
    return StoredTensor(storage.record, dtype, offset, tuple(shape), tuple(strides))


def _parameter(tensor: StoredTensor, *_: object) -> StoredTensor:
    """A torch.nn.Parameter is its tensor."""
    return tensor


def _encode(text: str, encoding: str) -> bytes:
    """What the bytes of old pickle protocols come as."""
    return text.encode(encoding)


_DCP = "torch.distributed.checkpoint"
_INDEX_NAMES: dict[tuple[str, str], Any] = {
    (f"{_DCP}.metadata", "Metadata"): Metadata,
    (f"{_DCP}.metadata", "TensorStorageMetadata"): TensorMetadata,
    (f"{_DCP}.metadata", "BytesStorageMetadata"): BytesMetadata,
    (f"{_DCP}.metadata", "TensorProperties"): TensorProperties,
    (f"{_DCP}.metadata", "ChunkStorageMetadata"): Record,
    (f"{_DCP}.metadata", "MetadataIndex"): MetadataIndex,
    (f"{_DCP}.metadata", "StorageMeta"): Inert,
    (f"{_DCP}.metadata", "_MEM_FORMAT_ENCODING"): Inert,
    (f"{_DCP}.filesystem", "_StorageInfo"): StorageInfo,
    (f"{_DCP}.filesystem", "_StoragePrefix"): Inert,
    # megatron-core keeps every rank's plan beside the index.
    (f"{_DCP}.planner", "SavePlan"): Inert,
    (f"{_DCP}.planner", "WriteItem"): Inert,
    (f"{_DCP}.planner", "WriteItemType"): Inert,
    (f"{_DCP}.planner", "TensorWriteData"): Inert,
    (f"{_DCP}.planner", "BytesIOWriteData"): Inert,
    # torch before 2.3
    ("torch.distributed._shard.sharded_tensor.metadata", "TensorProperties"): TensorProperties,
    ("torch.distributed._shard.sharded_tensor.metadata", "MEM_FORMAT_ENCODING"): Inert,
    ("torch.serialization", "_get_layout"): Inert,
    ("pathlib", "PosixPath"): Inert,
    ("pathlib", "Path"): Inert,
}
_TENSOR_NAMES: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): _typed,
    ("torch._utils", "_rebuild_tensor_v3"): _untyped,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch.storage", "UntypedStorage"): _StorageType(None),
    ("torch", "UntypedStorage"): _StorageType(None),
    ("torch", "BFloat16Storage"): _StorageType("bfloat16"),
    ("torch", "BoolStorage"): _StorageType("bool"),
    ("torch", "ByteStorage"): _StorageType("uint8"),
    ("torch", "CharStorage"): _StorageType("int8"),
    ("torch", "DoubleStorage"): _StorageType("float64"),
    ("torch", "FloatStorage"): _StorageType("float32"),
    ("torch", "HalfStorage"): _StorageType("float16"),
    ("torch", "IntStorage"): _StorageType("int32"),
    ("torch", "LongStorage"): _StorageType("int64"),
    ("torch", "ShortStorage"): _StorageType("int16"),
}
_PLAIN_NAMES: dict[tuple[str, str], Any] = {
    ("torch", "Size"): _size,
    ("torch", "device"): Inert,
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _encode,
    **{(module, kind.__name__): kind for module in ("builtins", "__builtin__") for kind in (set, frozenset, complex, bytearray)},
}

_COMMON_NAMES: dict[tuple[str, str], Any] = {
    ("argparse", "Namespace"): Namespace,
    # Of arguments, random streams and TransformerEngine's scaling state.
    ("types", "SimpleNamespace"): Inert,
    ("signal", "Signals"): Inert,
    ("pathlib", "PosixPath"): Inert,
    ("_io", "BytesIO"): Inert,
    ("numpy.core.multiarray", "_reconstruct"): Inert,
    ("numpy._core.multiarray", "_reconstruct"): Inert,
    ("numpy", "ndarray"): Inert,
    ("numpy", "dtype"): Inert,
    ("numpy.dtypes", "UInt32DType"): Inert,
}


def _index_name(module: str, name: str) -> Any:
    return _plain_name(module, name) or _INDEX_NAMES.get((module, name))


def _tensor_name(module: str, name: str) -> Any:
    return _plain_name(module, name) or _TENSOR_NAMES.get((module, name))


def _common_name(module: str, name: str) -> Any:
    if module.split(".")[0] in ("megatron", "transformer_engine"):
        return Inert
    return _COMMON_NAMES.get((module, name)) or _tensor_name(module, name)


def _plain_name(module: str, name: str) -> Any:
    return DtypeName(name) if module == "torch" and name in DTYPES else _PLAIN_NAMES.get((module, name))
