"""The hash that a server on GPUs reports of a tensor (`gpu_tensor_hash` of SGLang 0.5.23), of bytes that come in pieces.

Little-endian 32-bit words, mixed with their position, are summed over tiles; tiles are mixed and summed to 64 bits. It is computed on
the sender's GPU where there is one.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SEED = 0x243F6A88
_SEEDS = (_SEED, ((_SEED * 0x9E3779B1) ^ 0xDEADBEEF) & 0xFFFFFFFF)
_POSITION_FACTORS, _POSITION_TURNS = (0x27D4EB2D, 0x165667B1), (15, 13)
_MIX_FACTORS = (0x85EBCA6B, 0xC2B2AE35)
_FINAL_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_TILE_WORDS = 8192
_CHUNK_WORDS = {"cpu": 32 * _TILE_WORDS, "cuda": 2048 * _TILE_WORDS}
"""Words worked on at a time; the temporary tensors are a few times as long."""
_MASK32, _MASK64 = 2**32 - 1, 2**64 - 1


class WordHash:
    """Of a tensor of `num_bytes`; `update` with its bytes in order."""

    def __init__(self, num_bytes: int):
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._num_words = -(-num_bytes // 4)
        self._tiles = torch.zeros(2, -(-self._num_words // _TILE_WORDS), dtype=torch.int64, device=self._device)
        self._num_done = 0
        self._rest = torch.empty(0, dtype=torch.uint8)

    def update(self, data: Tensor) -> None:
        """Append the next bytes, flat uint8 on any device."""
        if len(self._rest):
            data = torch.cat([self._rest.to(data.device), data])
        whole = len(data) // 4 * 4
        self._rest = data[whole:].clone()
        aligned = data[:whole] if data.data_ptr() % 4 == 0 and data.storage_offset() % 4 == 0 else data[:whole].clone()
        for words in aligned.view(torch.int32).split(_CHUNK_WORDS[self._device]):
            self._add(words.to(self._device))

    def hexdigest(self) -> str:
        """16 hex digits. All bytes must have come."""
        if len(self._rest):
            self.update(torch.zeros(4 - len(self._rest), dtype=torch.uint8))
        if self._num_done != self._num_words:
            raise ValueError(f"{self._num_done} of {self._num_words} words have come")
        high, low = _mix(self._tiles.to(torch.int32) ^ _signed(self._num_words * 4 & _MASK32)).to(torch.int64)
        value = int(((high << 32) | (low & _MASK32)).sum()) & _MASK64
        for shift, factor in zip((30, 27), _FINAL_FACTORS, strict=True):
            value = ((value ^ value >> shift) * factor) & _MASK64
        return f"{value ^ value >> 31:016x}"

    def _add(self, words: Tensor) -> None:
        first, num_words = self._num_done, len(words)
        positions = torch.arange(first, first + num_words, device=words.device).to(torch.int32)
        before, after = first % _TILE_WORDS, -(first + num_words) % _TILE_WORDS
        tiles = slice(first // _TILE_WORDS, (first + num_words + after) // _TILE_WORDS)
        for sums, factor, turns, seed in zip(self._tiles, _POSITION_FACTORS, _POSITION_TURNS, _SEEDS, strict=True):
            turned = (positions << turns) | _shifted(positions, 32 - turns)
            mixed = _mix(words ^ ((positions * _signed(factor) + _signed(seed)) ^ turned))
            sums[tiles] += torch.nn.functional.pad(mixed, (before, after)).view(-1, _TILE_WORDS).sum(dim=1, dtype=torch.int64)
        self._num_done += num_words


def _mix(values: Tensor) -> Tensor:
    """The finaliser of MurmurHash3, on int32 that wraps as unsigned 32-bit numbers do."""
    for shift, factor in zip((16, 13), _MIX_FACTORS, strict=True):
        values = (values ^ _shifted(values, shift)) * _signed(factor)
    return values ^ _shifted(values, 16)


def _shifted(values: Tensor, num_bits: int) -> Tensor:
    """To the right, zeros coming in."""
    return (values >> num_bits) & ((1 << (32 - num_bits)) - 1)


def _signed(number: int) -> int:
    """The int32 of the same bits."""
    return number - 2**32 if number >= 2**31 else number
