"""A model of the same family, small enough for a laptop: what a layout can get wrong stays, the sizes go."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from dapo_megatron.config.schema import ActorConfig
from dapo_megatron.types import MappingError
from dapo_megatron.weights.families import with_defaults
from dapo_megatron.weights.families.dense import dense_sizes
from dapo_megatron.weights.hf_files import SINGLE_FILE
from dapo_megatron.weights.plan import compile_mapping

HIDDEN_SIZE = 64
HEAD_DIM = 8


def shrunk_config(
    hf_config: Mapping[str, Any], *, num_layers: int, tensor_parallel_size: int, expert_tensor_parallel_size: int = 1
) -> dict[str, Any]:
    """The config.json with narrow layers, `num_layers` of them.

    Heads, query groups, biases, norms, rope, tying and the number of experts stay, so that whatever divides or needs padding under
    these sizes still does. MappingError for an unsupported family.
    """
    if hf_config.get("kv_lora_rank"):
        raise MappingError(
            f"model_type ({hf_config['model_type']}) has latent attention, of which no small model can be made; use --no-shrink"
        )
    sizes = dense_sizes(with_defaults(hf_config))
    if sizes["f"] % tensor_parallel_size:
        raise MappingError(f"tensor parallel size ({tensor_parallel_size}) must divide intermediate_size ({sizes['f']})")
    return {
        **hf_config,
        "hidden_size": HIDDEN_SIZE,
        "head_dim": HEAD_DIM,
        "intermediate_size": math.lcm(96, tensor_parallel_size, expert_tensor_parallel_size),
        **({"moe_intermediate_size": math.lcm(32, expert_tensor_parallel_size)} if "moe_intermediate_size" in hf_config else {}),
        "num_hidden_layers": num_layers,
        "vocab_size": 64 * tensor_parallel_size + sizes["v"] % tensor_parallel_size,
        "torch_dtype": "float32",
    }


def shrunk_for(hf_config: Mapping[str, Any], actors: Sequence[ActorConfig]) -> dict[str, Any]:
    """As few narrow layers as all these layouts can divide; all layers where pipeline stages are uneven."""
    uneven = any(a.num_layers_in_first_pipeline_stage or a.num_layers_in_last_pipeline_stage for a in actors)
    chunks = math.lcm(*(a.pipeline_parallel_size * (a.virtual_pipeline_size or 1) for a in actors))
    return shrunk_config(
        hf_config,
        num_layers=hf_config["num_hidden_layers"] if uneven else max(chunks, 2),
        tensor_parallel_size=math.lcm(*(a.tensor_parallel_size for a in actors)),
        expert_tensor_parallel_size=math.lcm(*(a.expert_tensor_parallel_size for a in actors)),
    )


def write_random_model(hf_config: Mapping[str, Any], directory: Path, seed: int) -> None:
    """An HF directory (config.json, fp32 weights, no tokenizer) with random weights.

    Norms and biases are random too, so that a misplaced one shows; activations and logits are of order 1.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in compile_mapping(hf_config).hf_tensors.items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            tensors[name] = noise / math.sqrt(shape[-1])
        else:
            tensors[name] = 0.1 * noise + (0 if name.endswith(".bias") else 1)
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(dict(hf_config), indent=2))
    save_file(tensors, directory / SINGLE_FILE)
