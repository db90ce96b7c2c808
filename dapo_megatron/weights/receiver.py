"""The engine's side of a weight sync: buckets into live tensors, then a commit that proves what the engine holds."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from dapo_megatron.types import FingerprintError
from dapo_megatron.weights.fingerprint import RunningFingerprint, fingerprint
from dapo_megatron.weights.sync import BucketReader, WeightBucket, WeightManifest


class BucketReceiver:
    """Receives one version of the weights. Make a new one for each version.

    `targets` are the engine's live tensors by HF name, in HF layout, any device, any floating dtype: exactly the tensors of
    `ModelMapping.hf_tensors`, so no `lm_head.weight` that is tied to the embedding.
    """

    def __init__(self, targets: Mapping[str, torch.Tensor], version: int) -> None:
        self._targets = dict(targets)
        self._version = version
        self._reader = BucketReader({name: tuple(target.shape) for name, target in targets.items()}, version)
        self._wire_fingerprints: dict[str, RunningFingerprint] = {}

    @torch.no_grad()
    def receive(self, bucket: WeightBucket) -> None:
        """Write the bucket's rows into the targets, cast to their dtype. Errors as `BucketReader.read`."""
        for piece, raw in self._reader.read(bucket):
            target = self._targets[piece.name]
            rows = _as_tensor(raw, getattr(torch, bucket.dtype))
            target[piece.row_start : piece.row_start + piece.num_rows].copy_(rows.view(piece.num_rows, *target.shape[1:]))
            if target.dtype != rows.dtype:
                self._wire_fingerprints.setdefault(piece.name, RunningFingerprint()).update(raw)

    def commit(self, manifest: WeightManifest) -> None:
        """Accept the version, or raise FingerprintError: rows are missing, or a fingerprint differs (names the first tensors)."""
        if manifest.version != self._version:
            raise FingerprintError(
                f"manifest of version {manifest.version} must be of version {self._version}; send one version at a time"
            )
        self._reader.finish()
        if manifest.fingerprints.keys() != self._targets.keys():
            differing = sorted(manifest.fingerprints.keys() ^ self._targets.keys())
            raise FingerprintError(
                f"manifest and engine differ in {len(differing)} tensors: {_first(differing)}; serve the trained model"
            )
        wrong = [name for name, sent in manifest.fingerprints.items() if self._held_fingerprint(name) != sent]
        if wrong:
            raise FingerprintError(
                f"version {self._version}: {len(wrong)} of {len(self._targets)} tensors differ from those sent: {_first(wrong)}; "
                "do not generate with them, send the version again"
            )

    def _held_fingerprint(self, name: str) -> str:
        """Of the live tensor where it has the wire's dtype, else of the bytes that were cast into it."""
        wire = self._wire_fingerprints.get(name)
        return fingerprint(self._targets[name]) if wire is None else wire.hexdigest()


def _as_tensor(raw: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """Bytes as a flat tensor. Read-only bytes (an object store's) are copied: torch cannot wrap them without a warning."""
    return torch.from_numpy(raw if raw.flags.writeable else raw.copy()).view(dtype)


def _first(names: list[str], num_shown: int = 3) -> str:
    return ", ".join(names[:num_shown]) + (", ..." if len(names) > num_shown else "")
