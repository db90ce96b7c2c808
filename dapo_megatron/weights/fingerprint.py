"""Fingerprints of weights: xxh3_64 over the raw little-endian bytes of a tensor in HF layout.

They depend on the HF layout and the dtype alone, so an actor under any parallel layout and an engine agree on them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import xxhash

if TYPE_CHECKING:
    import torch

    type TensorBytes = np.ndarray | bytes | bytearray | memoryview | torch.Tensor


def fingerprint(view: TensorBytes) -> str:
    """16 hex digits for a tensor (torch on any device, numpy) or a buffer. Strides do not matter, shape is not part of it."""
    return xxhash.xxh3_64_hexdigest(_raw_bytes(view))


class RunningFingerprint:
    """The fingerprint of a tensor whose rows come in pieces, in order."""

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_64()

    def update(self, view: TensorBytes) -> None:
        """Append the next rows."""
        self._hash.update(_raw_bytes(view))

    def hexdigest(self) -> str:
        """Equal to `fingerprint` of all rows so far, put together."""
        return self._hash.hexdigest()


def _raw_bytes(view: TensorBytes) -> np.ndarray | bytes | bytearray | memoryview:
    if isinstance(view, bytes | bytearray | memoryview):
        return view
    if isinstance(view, np.ndarray):
        return np.ascontiguousarray(view)
    import torch

    # numpy has no bfloat16, so the bytes leave torch as uint8.
    return view.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
