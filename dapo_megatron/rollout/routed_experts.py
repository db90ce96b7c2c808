"""Which experts a server sent each token to (`rollout.engine.return_routed_experts`): what it says, in as few bytes as hold it."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dapo_megatron.types import EngineError

_NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """What is known beforehand."""

    num_layers: int
    """All of the model; in one without experts every choice is 0."""
    top_k: int
    num_experts: int

    @classmethod
    def of(cls, hf_config: Mapping[str, Any]) -> ExpertShape | None:
        """Of a model's config.json; None where it has no experts."""
        num_experts = next((hf_config[name] for name in _NUM_EXPERTS if hf_config.get(name)), None)
        if num_experts is None or not hf_config.get("num_experts_per_tok"):
            return None
        return cls(hf_config["num_hidden_layers"], hf_config["num_experts_per_tok"], num_experts)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The smallest that holds every expert's number."""
        return np.min_scalar_type(self.num_experts - 1)

    def decode(self, text: str) -> np.ndarray:
        """[rows, num_layers, top_k] of a server's base64 of int32. EngineError for anything else."""
        try:
            numbers = np.frombuffer(base64.b64decode(text, validate=True), "<i4").reshape(-1, self.num_layers, self.top_k)
        except (binascii.Error, ValueError) as error:
            raise EngineError(
                f"a server's routed experts are no table of {self.num_layers} layers x {self.top_k} experts: {error}; serve the model that is trained"
            ) from error
        if numbers.size and not 0 <= numbers.min() <= numbers.max() < self.num_experts:
            raise EngineError(
                f"a server routed tokens to experts {numbers.min()} .. {numbers.max()}, but the model has {self.num_experts}; serve the model that is trained"
            )
        return numbers.astype(self.dtype)
