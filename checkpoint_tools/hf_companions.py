"""What lies beside the weights of an HF directory: config.json, generation config, tokenizer, chat template, model code."""

from __future__ import annotations

from pathlib import Path

from dapo_megatron.types import CheckpointError

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
