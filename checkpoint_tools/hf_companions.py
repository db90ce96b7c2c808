"""What lies beside the weights of an HF directory: config.json, generation config, tokenizer, chat template, model code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dapo_megatron.types import CheckpointError

CONFIG_FILE = "config.json"
COMPANIONS = "hf"
"""Folder beside a converted checkpoint with the files of the HF directory that are no weights."""
_WEIGHTS = ("*.safetensors", "*.index.json", "*.bin", "*.bin.*", "*.gguf", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.onnx", "*.ot")
_FOLDERS = ("additional_chat_templates",)
_OWN_FILES = ("provenance.json", "manifest.json")
"""Of this package: they speak about the weights."""


def companion_files(directory: Path) -> tuple[Path, ...]:
    """Files of an HF directory that are no weights, relative to it, sorted; hidden files and other folders are left out."""
    candidates = [*directory.iterdir(), *(file for folder in _FOLDERS for file in directory.glob(f"{folder}/*"))]
    return tuple(
        sorted(
            path.relative_to(directory)
            for path in candidates
            if path.is_file()
            and not path.name.startswith(".")
            and path.name not in _OWN_FILES
            and not any(path.match(pattern) for pattern in _WEIGHTS)
        )
    )


def copy_companions(source: Path, target: Path) -> tuple[str, ...]:
    """Copy them into `target`, which is made; the relative names. CheckpointError when one cannot be read; OSError: `target`."""
    names = companion_files(source)
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            content = (source / name).read_bytes()
        except OSError as error:
            raise CheckpointError(f"{source / name} cannot be read ({error.strerror}); mend its permissions") from error
        (target / name).write_bytes(content)
    return tuple(str(name) for name in names)


def read_hf_config(directory: Path) -> dict[str, Any]:
    """The config.json of an HF directory. CheckpointError when there is none or it is no JSON object."""
    file = directory / CONFIG_FILE
    try:
        value = json.loads(file.read_text())
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror}); give a Hugging Face directory") from error
    except ValueError as error:
        raise CheckpointError(f"{file} is no JSON ({error}); get it again") from error
    if not isinstance(value, dict) or "model_type" not in value:
        raise CheckpointError(f"{file} has no model_type; give the config.json of a model")
    return value
