"""What megatron-core computes from a torch_dist checkpoint, on one rank: an oracle for conversions.

Importing this module imports megatron-core; call `cpu_adapter.install()` first.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException

from dapo_megatron.actor import parallel
from dapo_megatron.actor.policy import build_modules
from dapo_megatron.config.schema import Config
from dapo_megatron.models.architecture import Architecture
from dapo_megatron.models.packed import pack_sequences
from dapo_megatron.types import CheckpointError

_EXTRA_STATE = "_extra_state"


def checkpoint_logits(
    hf_dir: Path, directory: Path, sequences: Sequence[np.ndarray], *, stacked_layers: bool
) -> list[np.ndarray]:
    """fp32 logits [T, V] of each sequence (int64 token ids [T]), by the weights that megatron-core loads from `directory`.

    `hf_dir` has the model's config.json; V is its vocabulary, without padding. `stacked_layers`: the checkpoint has one tensor over
    all layers instead of one a layer. CheckpointError when megatron-core does not load it.
    """
    config = Config.model_validate(
        {
            "model": {"path": str(hf_dir), "dtype": "fp32", "transformer_impl": "local"},
            "data": {"path": "unused"},
            "actor": {"num_threads": torch.get_num_threads()},
        }
    )
    architecture = Architecture.from_hf(json.loads((hf_dir / "config.json").read_text()))
    with tempfile.TemporaryDirectory() as folder:
        device = parallel.initialize(config, rank=0, init_method=f"file://{folder}/rendezvous")
        try:
            (module,), _ = build_modules(architecture, config, device)
            _load(module, directory, stacked_layers)
            module.eval()
            lengths = np.array([len(sequence) for sequence in sequences])
            pack = pack_sequences(np.arange(lengths.sum()), lengths, device)
            tokens = torch.from_numpy(np.concatenate(sequences)).to(device)[None]
            with torch.no_grad():
                logits = module(tokens, None, None, packed_seq_params=pack)
            values = logits[0, :, : architecture.vocab_size].float().cpu().numpy()
            return np.split(values, np.cumsum(lengths)[:-1])
        finally:
            parallel.destroy()


def _load(module: torch.nn.Module, directory: Path, stacked_layers: bool) -> None:
    """Every parameter; TransformerEngine's scaling state is neither asked for nor needed in fp32."""
    metadata = {"non_homogeneous_layers": not stacked_layers}
    wanted = {
        name: value
        for name, value in module.sharded_state_dict(metadata=metadata).items()  # type: ignore[operator]
        if not name.endswith(_EXTRA_STATE)
    }
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about torch's own use of itself
            state = dist_checkpointing.load(wanted, str(directory))
    except CheckpointingException as error:
        raise CheckpointError(f"{directory} does not fit this model: {error}") from error
    missing, unexpected = module.load_state_dict({name: state[name] for name in wanted}, strict=False)
    if wrong := [name for name in missing if not name.endswith(_EXTRA_STATE)] + list(unexpected):
        raise CheckpointError(f"{directory} does not fit this model: {wrong[0]}")
