"""The tensors of an HF directory: checked against a mapping, read slice by slice."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from dapo_megatron.types import CheckpointError, MappingError
from dapo_megatron.weights.codecs import FP8, Block, block_of, dequantise, scale_name, scale_shape, scale_slices
from dapo_megatron.weights.plan import ModelMapping

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_FLOAT_DTYPES = ("F32", "BF16", "F16")
_EMBEDDING = "model.embed_tokens.weight"
_TIED_HEAD = "lm_head.weight"
_IGNORABLE = {
    r"lm_head\.weight": "tied to the embedding, checked to be equal",
    r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq": "buffer of old transformers versions, computed from the config",
}
"""Pattern of a tensor that may be in the files though the model does not have it -> why."""


@dataclass(frozen=True, slots=True)
class HfTensor:
    """Header of one tensor: `dtype` as safetensors writes it (F32, BF16, F16, ...), `file` within the directory."""

    shape: tuple[int, ...]
    dtype: str
    file: str


class HfFiles:
    """The safetensors weights of an HF directory, one file or sharded with an index. Only headers are read up front.

    Block-scaled FP8 weights come out in bf16. CheckpointError when files are missing or unreadable.
    """

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        self._open_files: dict[str, Any] = {}
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
        file = self.tensors[name].file
        if file not in self._open_files:
            self._open_files[file] = self._open(file, framework="pt")
        if slices is None:
            return self._open_files[file].get_tensor(name)
        return self._open_files[file].get_slice(name)[slices]

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
        ignored = {name: self._why_ignorable(name, mapping) for name in others}
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

    def _why_ignorable(self, name: str, mapping: ModelMapping) -> str:
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
            handle = self._open(file, framework="numpy")
            names = set(handle.keys()) if expected_names is None else expected_names
            if missing := sorted(names - set(handle.keys())):
                raise CheckpointError(
                    f"{self.directory / file} lacks {missing[0]}, which {INDEX_FILE} places there; get the files again"
                )
            for name in sorted(names):
                header = handle.get_slice(name)
                tensors[name] = HfTensor(tuple(header.get_shape()), header.get_dtype(), file)
        return tensors

    def _files(self) -> Mapping[str, set[str] | None]:
        """File -> the tensors the index places there; None: all it holds."""
        if (self.directory / SINGLE_FILE).is_file():
            return {SINGLE_FILE: None}
        if (self.directory / INDEX_FILE).is_file():
            files: dict[str, set[str]] = {}
            for name, file in json.loads((self.directory / INDEX_FILE).read_text())["weight_map"].items():
                files.setdefault(file, set()).add(name)
            return files
        if any(self.directory.glob("pytorch_model*.bin*")):
            raise CheckpointError(
                f"{self.directory} has only pytorch_model.bin; weights must be safetensors: convert it with save_pretrained"
            )
        raise CheckpointError(
            f"{self.directory} must have {SINGLE_FILE} or {INDEX_FILE}; model.path must be an HF directory with weights"
        )

    def _open(self, file: str, framework: str) -> Any:
        try:
            return safe_open(self.directory / file, framework=framework)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.directory / file} cannot be read ({error}); get the file again") from error
