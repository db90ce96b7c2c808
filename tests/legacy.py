"""Legacy Megatron-LM checkpoints of one rank, without megatron-core: `reshard` makes more ranks of them."""

from __future__ import annotations

import argparse
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dapo_megatron.weights.families import megatron_arguments
from tests.torch_dist import mcore_tensors

FILE = "model_optim_rng.pt"


def write_legacy(hf_dir: Path, folder: Path, *, grouped_experts: bool = False, **arguments: Any) -> Path:
    """Save the model of `hf_dir` as iteration 100 of a run on one rank; `arguments` are more of Megatron-LM's.

    Expert names are those of megatron-core's own experts, or with `grouped_experts` of TransformerEngine's grouped linear, which
    has scaling state besides.
    """
    hf_config = json.loads((hf_dir / "config.json").read_text())
    model: dict[str, Any] = {}
    for name, tensor in mcore_tensors(hf_dir).items():
        if grouped_experts:
            name = re.sub(r"experts\.experts\.(\d+)\.(.*)", r"experts.\2\1", name)
        model[name.replace("experts.experts.", "experts.local_experts.")] = tensor
    if grouped_experts:
        layers = range(hf_config["num_hidden_layers"])
        model |= {f"decoder.layers.{layer}.mlp.experts.linear_fc1._extra_state": io.BytesIO(b"scales") for layer in layers}
    args = argparse.Namespace(**{**megatron_arguments(hf_config), "transformer_impl": "local"} | arguments)
    content = {"args": args, "checkpoint_version": 3.0, "iteration": 100, "model": model}
    rank = folder / "iter_0000100" / "mp_rank_00"
    rank.mkdir(parents=True)
    torch.save(content, rank / FILE)
    (folder / "latest_checkpointed_iteration.txt").write_text("100")
    return folder


def load_rank(folder: Path, rank: str) -> dict[str, Any]:
    """What the rank's file holds, a file of ours: tensors and plain values are all that is unpickled."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(folder / "iter_0000100" / rank / FILE, weights_only=True)


def change_rank(folder: Path, rank: str, change: Callable[[dict[str, Any]], object]) -> None:
    """Save a rank's file anew after `change` has changed its content."""
    content = load_rank(folder, rank)
    change(content)
    torch.save(content, folder / "iter_0000100" / rank / FILE)
