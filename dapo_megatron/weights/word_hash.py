"""The hash that a server on GPUs reports of a tensor (`gpu_tensor_hash` of SGLang 0.5.23), of bytes that come in pieces.

Little-endian 32-bit words, mixed with their position, are summed over tiles; tiles are mixed and summed to 64 bits.
"""

from __future__ import annotations

import numpy as np

_SEED = 0x243F6A88
_SEEDS = (_SEED, ((_SEED * 0x9E3779B1) ^ 0xDEADBEEF) & 0xFFFFFFFF)
_POSITION_FACTORS, _POSITION_TURNS = (0x27D4EB2D, 0x165667B1), (15, 13)
_MIX_FACTORS = (0x85EBCA6B, 0xC2B2AE35)
_FINAL_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_TILE_WORDS = 8192
_CHUNK_WORDS = 128 * _TILE_WORDS
"""Words worked on at a time; the temporary arrays are a few times as long."""


class WordHash:
    """Of a tensor of `num_bytes`; `update` with its bytes in order."""

    def __init__(self, num_bytes: int):
        self._num_words = -(-num_bytes // 4)
        self._tiles = np.zeros((2, -(-self._num_words // _TILE_WORDS)), np.uint32)
        self._num_done = 0
        self._rest = b""

    def update(self, data: memoryview | bytes) -> None:
        """Append the next bytes."""
        raw = np.frombuffer(data, np.uint8)
        if self._rest:
            raw = np.concatenate([np.frombuffer(self._rest, np.uint8), raw])
        whole = len(raw) // 4 * 4
        self._rest = raw[whole:].tobytes()
        words = raw[:whole].view(np.uint32) if raw.ctypes.data % 4 == 0 else np.frombuffer(raw[:whole].tobytes(), np.uint32)
        for start in range(0, len(words), _CHUNK_WORDS):
            self._add(words[start : start + _CHUNK_WORDS])

    def hexdigest(self) -> str:
        """16 hex digits. All bytes must have come."""
        if self._rest:
            self.update(bytes(4 - len(self._rest)))
        if self._num_done != self._num_words:
            raise ValueError(f"{self._num_done} of {self._num_words} words have come")
        high, low = (_mix(sums ^ np.uint32(self._num_words * 4 & 0xFFFFFFFF)).astype(np.uint64) for sums in self._tiles)
        value = int(np.sum((high << np.uint64(32)) | low, dtype=np.uint64))
        for shift, factor in zip((30, 27), _FINAL_FACTORS, strict=True):
            value = ((value ^ value >> shift) * factor) & (2**64 - 1)
        return f"{value ^ value >> 31:016x}"

    def _add(self, words: np.ndarray) -> None:
        first = self._num_done
        positions = np.arange(first, first + len(words)).astype(np.uint32)
        # Where a tile begins among these words; the first may have begun before.
        starts = np.maximum(np.arange(first // _TILE_WORDS, -(-(first + len(words)) // _TILE_WORDS)) * _TILE_WORDS - first, 0)
        tiles = slice(first // _TILE_WORDS, first // _TILE_WORDS + len(starts))
        for sums, factor, turns, seed in zip(self._tiles, _POSITION_FACTORS, _POSITION_TURNS, _SEEDS, strict=True):
            turned = (positions << np.uint32(turns)) | (positions >> np.uint32(32 - turns))
            keys = (positions * np.uint32(factor) + np.uint32(seed)) ^ turned
            sums[tiles] += np.add.reduceat(_mix(words ^ keys), starts, dtype=np.uint32)
        self._num_done += len(words)


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of MurmurHash3, 32 bits."""
    for shift, factor in zip((16, 13), _MIX_FACTORS, strict=True):
        values = (values ^ (values >> np.uint32(shift))) * np.uint32(factor)
    return values ^ (values >> np.uint32(16))
