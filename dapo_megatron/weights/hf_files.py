"""The tensors of an HF directory: checked against a mapping, read slice by slice."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from dapo_megatron.types import CheckpointError, MappingError
from dapo_megatron.weights.codecs import FP8, Block, block_of, dequantise, scale_name, scale_shape, scale_slices
from dapo_megatron.weights.hf_headers import TORCH_DTYPES, HfTensor, read_header
from dapo_megatron.weights.plan import ModelMapping
from dapo_megatron.weights.pread import read_into

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TORCH_FILE = "pytorch_model.bin"
TORCH_INDEX_FILE = "pytorch_model.bin.index.json"
_BLOCK_BYTES = 16 * 2**20
"""Of rows of which only some columns are wanted."""

_FLOAT_DTYPES = ("F32", "BF16", "F16")
_EMBEDDING = "model.embed_tokens.weight"
_TIED_HEAD = "lm_head.weight"
_IGNORABLE = {
    r"lm_head\.weight": "tied to the embedding, checked to be equal",
    r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq": "buffer of old transformers versions, computed from the config",
}
"""Pattern of a tensor that may be in the files though the model does not have it -> why."""


class HfFiles:
    """The weights of an HF directory, safetensors or else pytorch_model.bin, one file or sharded with an index.

    Only headers are read up front. A read touches no more memory than it returns, and a block: files are not mapped.

    Block-scaled FP8 weights come out in bf16. CheckpointError when files are missing or unreadable.
    """

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        self.tensors: Mapping[str, HfTensor] = self._read_headers()

    def read(self, name: str, slices: tuple[slice, ...] | None = None) -> torch.Tensor:
        """A tensor, or only that part of it (slices with numbers, one an axis), on CPU in the dtype of the file, FP8 in bf16."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.directory} has no tensor {name}; it is not a checkpoint of this model")
        if self.tensors[name].dtype != FP8:
            return self._read(name, slices)
        block, part = self._block, slices or tuple(slice(0, size) for size in self.tensors[name].shape)
        return dequantise(self._read(name, part), self._read(scale_name(name), scale_slices(part, block)), part, block)

    @cached_property
    def _block(self) -> Block:
        """The block of the FP8 weights here. MappingError when config.json knows of none."""
        block = block_of(json.loads((self.directory / "config.json").read_text()))
        if block is None:
            raise MappingError(
                f"{self.directory} has FP8 weights, so its config.json must have a quantization_config; "
                "use the config.json that belongs to these weights"
            )
        return block

    def _read(self, name: str, slices: tuple[slice, ...] | None) -> torch.Tensor:
        import torch

        header = self.tensors[name]
        shape = header.shape or (1,)
        wanted = (slice(*part.indices(size)) for part, size in zip(slices or [slice(None)] * len(shape), shape, strict=True))
        rows, *columns = wanted
        inner = shape[1:]
        result = torch.empty(
            (rows.stop - rows.start, *(part.stop - part.start for part in columns)),
            dtype=getattr(torch, TORCH_DTYPES[header.dtype]),
        )
        row_bytes = math.prod(inner) * result.itemsize
        is_whole = all((part.start, part.stop) == (0, size) for part, size in zip(columns, inner, strict=True))
        rows_at_once = len(result) if is_whole else max(1, _BLOCK_BYTES // row_bytes)
        path = self.directory / header.file
        with _reading(path), path.open("rb", buffering=0) as file:
            for row0 in range(0, len(result), rows_at_once):
                target = result[row0 : row0 + rows_at_once]
                block = target if is_whole else torch.empty((len(target), *inner), dtype=result.dtype)
                view = memoryview(block.view(-1).view(torch.uint8).numpy())
                if read_into(file.fileno(), view, header.offset + (rows.start + row0) * row_bytes) != len(view):
                    raise CheckpointError(f"{path} ends within {name}: it is truncated; get the file again")
                if not is_whole:
                    target.copy_(block[(slice(None), *columns)])
        return result if header.shape else result[0]

    def check(self, mapping: ModelMapping) -> dict[str, str]:
        """Raise MappingError unless the files hold exactly the mapping's HF tensors, in its shapes and a float dtype.

        Returns the tensors that are left out though present: name -> reason; each is logged as well.
        """
        for name, shape in mapping.hf_tensors.items():
            if name not in self.tensors:
                raise MappingError(
                    f"{self.directory} lacks {name} {shape}, which its config.json asks for; get the complete checkpoint"
                )
            if self.tensors[name].shape != shape:
                raise MappingError(
                    f"{self.directory}: {name} has shape {self.tensors[name].shape}, its config.json asks for {shape}; "
                    "use the config.json that belongs to these weights"
                )
            if self.tensors[name].dtype == FP8:
                self._check_scales(name)
            elif self.tensors[name].dtype not in _FLOAT_DTYPES:
                raise MappingError(
                    f"{self.directory}: {name} is {self.tensors[name].dtype}, must be one of {', '.join(_FLOAT_DTYPES)}; "
                    "use the unquantised model"
                )
        scales = {scale_name(name) for name in mapping.hf_tensors if self.tensors[name].dtype == FP8}
        others = [name for name in self.tensors if name not in mapping.hf_tensors and name not in scales]
        ignored = {name: self.why_ignorable(name, mapping) for name in others}
        for name, reason in ignored.items():
            logger.warning("%s: %s is not loaded: %s", self.directory, name, reason)
        return ignored

    def _check_scales(self, name: str) -> None:
        scales, wanted = self.tensors.get(scale_name(name)), scale_shape(self.tensors[name].shape, self._block)
        if scales is None or (scales.shape, scales.dtype) != (wanted, "F32"):
            found = "there is none" if scales is None else f"it is {scales.shape} {scales.dtype}"
            raise MappingError(
                f"{self.directory}: {name} is FP8, so {scale_name(name)} must be {wanted} F32, and {found}; "
                "get the complete checkpoint"
            )

    def why_ignorable(self, name: str, mapping: ModelMapping) -> str:
        """Why a tensor that the mapping does not have is left out. MappingError when it must not be."""
        for pattern, reason in (_IGNORABLE | dict(mapping.skipped)).items():
            if re.fullmatch(pattern, name):
                if name == _TIED_HEAD:
                    self._check_tied_head()
                return reason
        raise MappingError(
            f"{self.directory} has {name} {self.tensors[name].shape}, which its config.json does not ask for; "
            "use the config.json that belongs to these weights, or add the tensor to the family's table"
        )

    def _check_tied_head(self, num_rows_at_once: int = 8192) -> None:
        """A head that differs from the embedding would be trained as if it did not: transformers would not tie the two."""
        embedding, head = self.tensors[_EMBEDDING], self.tensors[_TIED_HEAD]
        equal = (embedding.shape, embedding.dtype) == (head.shape, head.dtype) and all(
            self.read(_EMBEDDING, rows).equal(self.read(_TIED_HEAD, rows))
            for start in range(0, embedding.shape[0], num_rows_at_once)
            for rows in [(slice(start, start + num_rows_at_once), slice(0, embedding.shape[1]))]
        )
        if not equal:
            raise MappingError(
                f"{self.directory}: tie_word_embeddings (true) must mean that {_TIED_HEAD} equals {_EMBEDDING}, and they differ; "
                "set tie_word_embeddings to false in config.json"
            )

    def _read_headers(self) -> dict[str, HfTensor]:
        tensors: dict[str, HfTensor] = {}
        for file, expected_names in self._files().items():
            held = read_header(self.directory, file)
            names = held.keys() if expected_names is None else expected_names
            if missing := sorted(names - held.keys()):
                raise CheckpointError(
                    f"{self.directory / file} lacks {missing[0]}, which the index places there; get the files again"
                )
            tensors |= {name: held[name] for name in sorted(names)}
        return tensors

    def _files(self) -> Mapping[str, set[str] | None]:
        """File -> the tensors the index places there; None: all it holds."""
        with _reading(self.directory):
            names = {path.name for path in self.directory.iterdir()}
        for single, index in ((SINGLE_FILE, INDEX_FILE), (TORCH_FILE, TORCH_INDEX_FILE)):
            if single in names:
                return {single: None}
            if index in names:
                return _read_index(self.directory / index)
        raise CheckpointError(
            f"{self.directory} must have {SINGLE_FILE}, {TORCH_FILE} or an index of either; give an HF directory with weights"
        )


def _read_index(path: Path) -> dict[str, set[str] | None]:
    files: dict[str, set[str]] = {}
    with _reading(path):
        text = path.read_text()
    try:
        for name, file in json.loads(text)["weight_map"].items():
            if Path(file).name != file:
                raise CheckpointError(f"{path} places {name} in {file!r}, which must be a file beside it; get the files again")
            files.setdefault(file, set()).add(name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is no index of weights ({error!r}); get the file again") from error
    return dict(files)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); check its permissions and the disk") from error
