"""verify --logits: both sides run in fp32 on the same tokens, Hugging Face by transformers, Megatron by megatron-core itself."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from checkpoint_tools.byte_sizes import format_bytes
from checkpoint_tools.locate import Place
from checkpoint_tools.torch_dist import TorchDistReader
from dapo_megatron.types import ConfigError

TOLERANCE = 1e-4
"""Largest difference of logits that rounding in fp32 explains, relative to the largest logit where that is above 1."""
_LENGTHS = (33, 20, 7)
_MAX_PARAMETERS = 4 * 10**9
_STACKED_LAYERS = re.compile(r"decoder\.layers\.\D.*")


@dataclass(frozen=True, slots=True)
class LogitsComparison:
    """Over all positions of all sequences; there is no padding among them."""

    num_positions: int
    max_difference: float
    largest_logit: float
    num_same_choice: int
    """Positions where both sides prefer the same token."""

    @property
    def is_equal(self) -> bool:
        return self.max_difference <= TOLERANCE * max(1.0, self.largest_logit)


def check_size(num_parameters: int) -> None:
    """ConfigError for a model that is too large to be run here."""
    if num_parameters > _MAX_PARAMETERS:
        size = format_bytes(4 * num_parameters)
        problem = f"--logits holds the model in fp32, {size}; it is for up to {_MAX_PARAMETERS:,} parameters: leave it out"
        raise ConfigError([problem])


def sample_sequences(vocab_size: int) -> list[np.ndarray]:
    """Token ids to compare at, always the same."""
    random = np.random.default_rng(0)
    return [random.integers(0, vocab_size, length) for length in _LENGTHS]


def logits_of(place: Place, hf_dir: Path, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
    """fp32 logits [T, V] a sequence. `hf_dir` has the config.json of a Megatron checkpoint."""
    if place.kind == "hf":
        return _hf_logits(place.weights, sequences)
    place.require("hf", "torch_dist")
    from dapo_megatron.actor import cpu_adapter

    cpu_adapter.install()
    from dapo_megatron.actor.checkpoint_logits import checkpoint_logits

    with TorchDistReader(place.weights) as reader:
        stacked = any(_STACKED_LAYERS.fullmatch(key) for key in reader.tensors)
    return checkpoint_logits(hf_dir, place.weights, sequences, stacked_layers=stacked)


def compare_logits(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> LogitsComparison:
    """Logits of the same sequences from both sides."""
    first, second = np.concatenate(a), np.concatenate(b)
    return LogitsComparison(
        num_positions=len(first),
        max_difference=float(np.abs(first - second).max()),
        largest_logit=float(max(np.abs(first).max(), np.abs(second).max())),
        num_same_choice=int((first.argmax(axis=1) == second.argmax(axis=1)).sum()),
    )


def _hf_logits(directory: Path, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return [model(torch.from_numpy(sequence)[None]).logits[0].float().numpy() for sequence in sequences]
