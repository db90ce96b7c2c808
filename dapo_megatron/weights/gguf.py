"""A GGUF file as an HF directory, through transformers' own GGUF reader."""

from __future__ import annotations

import struct
from importlib.util import find_spec
from pathlib import Path

from dapo_megatron.types import CheckpointError, ConfigError

_PACKAGES = ("gguf", "accelerate")


def require_gguf() -> None:
    """ConfigError when the packages that transformers needs to read GGUF are not installed."""
    if missing := [package for package in _PACKAGES if find_spec(package) is None]:
        raise ConfigError([f"reading GGUF needs {' and '.join(missing)}; install them with `pip install dapo-megatron[smollm2]`"])


def write_gguf_as_hf(file: Path, directory: Path) -> None:
    """Write weights (dequantised, fp32 safetensors), config, generation config and tokenizer into `directory`, which exists.

    The whole model is in memory, 4 bytes a parameter. ConfigError when a package is missing, CheckpointError when transformers cannot
    read the file.
    """
    require_gguf()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        # Without `dequantize` transformers 5.19 loads the file and then cannot save it.
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )
    except (ValueError, KeyError, IndexError, OSError, NotImplementedError, struct.error) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{file} cannot be read by transformers' GGUF reader ({reason}); get the file again, or use a model it supports"
        ) from error
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
