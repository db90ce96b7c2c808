"""torch_dist checkpoints of an HF directory, written by torch's own checkpoint library: no megatron-core, no process group."""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemWriter, save

from dapo_megatron.weights.checkpoint_keys import checkpoint_places
from dapo_megatron.weights.hf_files import HfFiles
from dapo_megatron.weights.plan import Box, ModelMapping, compile_mapping, import_plan


def mcore_tensors(hf_dir: Path, mapping: ModelMapping | None = None) -> dict[str, torch.Tensor]:
    """Every megatron-core tensor of the model, whole, by the mapping's name."""
    mapping = mapping or compile_mapping(json.loads((hf_dir / "config.json").read_text()))
    files = HfFiles(hf_dir)
    tensors = {}
    for name, mapped in mapping.tensors.items():
        box = Box(name, (0,) * len(mapped.shape), mapped.shape, mapped.shape)
        copies = import_plan(mapping, [box])
        tensors[name] = torch.empty(mapped.shape, dtype=files.read(copies[0].hf_name).dtype)
        for copy in copies:
            tensors[name][copy.box_slices] = files.read(copy.hf_name, copy.hf_slices)
    return tensors


def write_torch_dist(
    hf_dir: Path,
    folder: Path,
    *,
    stacked: bool = False,
    arguments: dict[str, Any] | None = None,
    extra: dict[str, Any] | None = None,
    without: str | None = None,
) -> Path:
    """Save the model of `hf_dir`. `extra` is saved besides or instead, by key; `without` leaves a tensor of the mapping out."""
    mapping = compile_mapping(json.loads((hf_dir / "config.json").read_text()))
    tensors = mcore_tensors(hf_dir, mapping)
    state: dict[str, Any] = {}
    for name, place in checkpoint_places(mapping, stacked_layers=stacked).items():
        if name == without:
            continue
        if place.axes:
            shape = (*place.axes, *tensors[name].shape)
            state.setdefault(place.key, torch.full(shape, torch.nan, dtype=tensors[name].dtype))[place.index] = tensors[name]
        else:
            state[place.key] = tensors[name]
    return save_state(state | (extra or {}), folder, arguments)


def save_state(state: dict[str, Any], folder: Path, arguments: dict[str, Any] | None = None) -> Path:
    """Save tensors by key, with Megatron-LM's common state."""
    with warnings.catch_warnings():  # torch finds it remarkable that nothing is distributed
        warnings.simplefilter("ignore")
        save(state, storage_writer=FileSystemWriter(folder), no_dist=True)
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    common = {"args": argparse.Namespace(**(arguments or {})), "checkpoint_version": 3.0, "iteration": 100}
    torch.save(common, folder / "common.pt")
    return folder
