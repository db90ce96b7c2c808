"""A hash of a tensor that its parts add up to, however it is cut: the sum over elements of their bits times what their place stands for.

Rows are read in the wire's dtype as little-endian units of 32 bits (one fp32 or two 16-bit elements, zeros behind the last), two units a
word: low, unsigned, and high, signed. With fixed random odd 64-bit numbers a[r] for rows, b[k] for low units, g[k], and c[k] = 2**32 b[k] + g[k]
for high ones,

    hash = sum over r of a[r] * sum over k of (b[k] * low[r, k] + c[k] * high[r, k])        modulo 2**64

so the parts of a tensor, at whatever rows and columns they lie, have hashes whose sum is that of the whole. A vector is one row.

What it finds
*   Any difference in one unit, always: an odd number times less than 2**32 is not 0 modulo 2**64.
*   Of any other difference (rows, columns, blocks, tensors exchanged, shifted or transposed, a chunk that is zero, stale or there twice) all
    but about a share of (64 - v) / 2**(62 - v), where 2**v divides every unit's difference: 2**-56 where a lowest bit differs, 2**-26
    where nothing but signs do. A product of a row's and a column's number is enough: after the sum over columns, which is 0 for a wrong row
    with probability 2**-(63 - v), rows meet numbers that know nothing of it.
*   Not: elements that changed places with equal ones; a mapping whose table is wrong, since places come from it; a forger, who can compute it.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

_SEED = 0x5EED
_WORD_BYTES = 8
_INTEGER = {2: torch.int16, 4: torch.int32}
CHUNK_WORDS = {"cpu": 2**18, "cuda": 2**22}
"""Words worked on at a time (2 and 32 MiB), but whole rows; the temporary tensors are up to four times as long."""


class PlaceHash:
    """For parts of tensors of `shapes`, (rows,) or (rows, columns), in `dtype`; hashes are made on `device`, equal on all devices."""

    def __init__(self, shapes: Iterable[tuple[int, ...]], dtype: torch.dtype, device: torch.device):
        self._dtype, self._device = dtype, device
        self._per_word = _WORD_BYTES // dtype.itemsize
        shapes = list(shapes)
        num_rows = max(shape[0] if len(shape) == 2 else 1 for shape in shapes)
        num_words = max(-(-shape[-1] // self._per_word) for shape in shapes)
        self._rows, self._units, self._high_units = (
            torch.from_numpy((np.random.PCG64([_SEED, stream]).random_raw(count) | np.uint64(1)).view(np.int64)).to(device)
            for stream, count in enumerate((num_rows, num_words, num_words))
        )

    def of(self, part: Tensor, slices: tuple[slice, ...]) -> Tensor:
        """int64 [] of `part` (any dtype, device and strides) that lies at `slices` of its tensor; starts and stops must be numbers."""
        if part.dim() == 1:
            part, slices = part[None], (slice(0, 1), *slices)
        rows, columns = slices
        words = slice(columns.start // self._per_word, -(-columns.stop // self._per_word))
        units, high_units = self._units[words], self._high_units[words]
        num_rows = max(1, CHUNK_WORDS[self._device.type] // len(units))
        total = torch.zeros((), dtype=torch.int64, device=self._device)
        for start in range(0, len(part), num_rows):
            chunk = self._words(part[start : start + num_rows], columns)
            of_rows = _dot(chunk, units) + _dot(chunk >> 32, high_units)
            total += (of_rows * self._rows[rows.start + start :][: len(chunk)]).sum()
        return total

    def _words(self, part: Tensor, columns: slice) -> Tensor:
        """int64 [rows, words]: a view where the part's memory allows it, else a copy with zeros around what is cut inside a word."""
        part = part.to(device=self._device, dtype=self._dtype).view(_INTEGER[self._dtype.itemsize])
        before, after = columns.start % self._per_word, -columns.stop % self._per_word
        if before or after:
            part = torch.nn.functional.pad(part, (before, after))
        elif part.stride(1) != 1 or part.stride(0) % self._per_word or part.storage_offset() % self._per_word:
            part = part.clone(memory_format=torch.contiguous_format)
        return part.view(torch.int64)


def _dot(words: Tensor, numbers: Tensor) -> Tensor:
    """int64 [rows] modulo 2**64; CUDA has no product of integer matrices."""
    return (words * numbers).sum(dim=1) if words.is_cuda else torch.mv(words, numbers)
