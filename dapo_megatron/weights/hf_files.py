"""The tensors of an HF directory: checked against a mapping, read slice by slice."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from dapo_megatron.types import CheckpointError, MappingError
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

    CheckpointError when files are missing or unreadable.
    """

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        self._open_files: dict[str, Any] = {}
        self.tensors: Mapping[str, HfTensor] = self._read_headers()

    def read(self, name: str, slices: tuple[slice, ...] | None = None) -> torch.Tensor:
        """A tensor, or only that part of it (slices with numbers, one an axis), on CPU in the dtype of the file."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.directory} has no tensor {name}; it is not a checkpoint of this model")
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
            if self.tensors[name].dtype not in _FLOAT_DTYPES:
                raise MappingError(
                    f"{self.directory}: {name} is {self.tensors[name].dtype}, must be one of {', '.join(_FLOAT_DTYPES)}; "
                    "use the unquantised model"
                )
        ignored = {name: self._why_ignorable(name) for name in self.tensors if name not in mapping.hf_tensors}
        for name, reason in ignored.items():
            logger.warning("%s: %s is not loaded: %s", self.directory, name, reason)
        return ignored

    def _why_ignorable(self, name: str) -> str:
        for pattern, reason in _IGNORABLE.items():
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
