"""The files of a torch_dist checkpoint beside its tensors: .metadata, common.pt and metadata.json.

As torch 2.14 and megatron-core 0.19.2 read them: `.metadata` is a pickled torch.distributed.checkpoint.metadata.Metadata; `common.pt`,
the state that is not sharded, is what every megatron-core with torch_dist reads. Neither torch nor megatron-core is imported.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint_tools.pickle_writer import Call, Instance, Name, Pairs, pickled
from checkpoint_tools.torch_zip import archive
from dapo_megatron.weights.checkpoint_keys import CheckpointPlace
from dapo_megatron.weights.hf_headers import TORCH_DTYPES

CHECKPOINT_VERSION = 3.0
"""Megatron-LM's layout of q, k and v within linear_qkv."""
CONTENT_METADATA = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
"""What Megatron-LM says of its own saves; it asks its models for sharded tensors with it."""
_WITHOUT_EXTRA_STATE = ("word_embeddings", "output_layer", ".router")
_ATTENTION_OUTPUT = ".linear_proj"
_METADATA = "torch.distributed.checkpoint.metadata"
_FORMAT_VERSION = "1.0.0"


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """A piece of a tensor: `num_bytes` at `offset` of a file, archive included."""

    file: str
    offset: int
    num_bytes: int
    tensor_offset: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """`dtype` as safetensors writes it; its chunks tile it."""

    key: str
    shape: tuple[int, ...]
    dtype: str
    chunks: Sequence[StoredChunk]


def write_metadata(directory: Path, tensors: Iterable[StoredTensor], empty_objects: Sequence[str], objects_file: str) -> None:
    """Write .metadata and metadata.json, and `objects_file` with the one None that all of `empty_objects` stand for."""
    nothing = archive([None])
    (directory / objects_file).write_bytes(nothing)
    state = {key: Instance(Name(_METADATA, "BytesStorageMetadata"), {}) for key in empty_objects}
    storage = [(_index(key, None, None), _storage_info(objects_file, 0, len(nothing))) for key in empty_objects]
    for tensor in tensors:
        state[tensor.key] = _tensor_metadata(tensor)
        for number, chunk in enumerate(tensor.chunks):
            place = _storage_info(chunk.file, chunk.offset, chunk.num_bytes)
            storage.append((_index(tensor.key, chunk.tensor_offset, number), place))
    metadata = {
        "state_dict_metadata": state,
        "planner_data": None,
        "storage_data": Pairs(tuple(storage)),
        "storage_meta": None,
        "version": _FORMAT_VERSION,
    }
    (directory / ".metadata").write_bytes(pickled(Instance(Name(_METADATA, "Metadata"), metadata)))
    (directory / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))


def write_common_state(directory: Path, arguments: Mapping[str, Any]) -> None:
    """Write common.pt: Megatron-LM's namespace of arguments, by its names, and iteration 0."""
    state = {
        "args": Instance(Name("argparse", "Namespace"), dict(arguments)),
        "checkpoint_version": CHECKPOINT_VERSION,
        "iteration": 0,
        "content_metadata": CONTENT_METADATA,
    }
    (directory / "common.pt").write_bytes(archive(state))


def extra_state_objects(places: Iterable[CheckpointPlace]) -> list[str]:
    """Keys of the `_extra_state` entries that loading asks for.

    A module of TransformerEngine, and a parallel linear of megatron-core, asks for one; without FP8 it is empty. The attention
    itself has one too, beside linear_proj.
    """
    keys: dict[str, None] = {}
    for place in places:
        module = place.key.rpartition(".")[0]
        if module.endswith(_WITHOUT_EXTRA_STATE):
            continue
        shard = f"{_dotted(place.index or (0,))}_{_dotted(place.axes or (1,))}"
        keys[f"{module}._extra_state/shard_{shard}"] = None
        if module.endswith(_ATTENTION_OUTPUT):
            keys[f"{module.removesuffix(_ATTENTION_OUTPUT)}.core_attention._extra_state/shard_{shard}"] = None
    return list(keys)


def _dotted(numbers: Sequence[int]) -> str:
    return ".".join(map(str, numbers))


def _tensor_metadata(tensor: StoredTensor) -> Instance:
    chunks = [
        Instance(Name(_METADATA, "ChunkStorageMetadata"), {"offsets": _size(chunk.tensor_offset), "sizes": _size(chunk.shape)})
        for chunk in tensor.chunks
    ]
    layout = Call(Name("torch.serialization", "_get_layout"), ("torch.strided",))
    contiguous = Call(Name(_METADATA, "_MEM_FORMAT_ENCODING"), (0,))
    properties = (Name("torch", TORCH_DTYPES[tensor.dtype]), layout, False, contiguous, False)
    return Instance(
        Name(_METADATA, "TensorStorageMetadata"),
        {
            "properties": Instance(Name(_METADATA, "TensorProperties"), properties),
            "size": _size(tensor.shape),
            "chunks": chunks,
        },
    )


def _index(key: str, offset: tuple[int, ...] | None, number: int | None) -> Instance:
    state = {"fqn": key, "index": number}
    return Instance(Name(_METADATA, "MetadataIndex"), state if offset is None else state | {"offset": _size(offset)})


def _storage_info(file: str, offset: int, num_bytes: int) -> Instance:
    state = {"relative_path": file, "offset": offset, "length": num_bytes}
    return Instance(Name("torch.distributed.checkpoint.filesystem", "_StorageInfo"), state)


def _size(shape: Sequence[int]) -> Call:
    return Call(Name("torch", "Size"), (tuple(shape),))
