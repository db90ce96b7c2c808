"""Keys and values of the sequences in decoding, one row each, and the attention that reads them.

Shape letters: R rows in use, N rows that enter or move, H query heads, K key/value heads, L positions, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

ATTENTION = "grouped_sdpa"


class RowCacheLayer(CacheLayerMixin):
    """Keys and values [rows, K, capacity, D] of one layer; position p of a row lies at index p.

    Positions past the end of a row hold zeros or what an earlier row left there: finite, and masked by the caller.
    """

    def __init__(self, num_rows: int, capacity: int):
        super().__init__()
        self.num_rows, self.capacity = num_rows, capacity
        self.rows: Tensor | None = None
        self.positions: Tensor | None = None
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate in the shape and dtype of the first keys and values."""
        self.keys = key_states.new_zeros(self.num_rows, key_states.shape[1], self.capacity, key_states.shape[3])
        self.values = value_states.new_zeros(self.num_rows, value_states.shape[1], self.capacity, value_states.shape[3])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write one token [R, K, 1, D] per row at the positions of this step; return views [R, K, L, D]."""
        self.keys[self.rows, :, self.positions] = key_states[:, :, 0]
        self.values[self.rows, :, self.positions] = value_states[:, :, 0]
        num_rows = len(key_states)
        return self.keys[:num_rows, :, : self.length], self.values[:num_rows, :, : self.length]

    def get_seq_length(self) -> int:
        """Longest row in this step."""
        return self.length

    def get_max_length(self) -> int:
        """Positions allocated."""
        return self.capacity

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Key length and offset of the step's mask."""
        return self.length, 0


class RowCache(Cache):
    """A transformers cache for continuous batching: rows of different lengths, always dense in [0, R)."""

    def __init__(self, num_layers: int, num_rows: int, capacity: int):
        super().__init__(layers=[RowCacheLayer(num_rows, capacity) for _ in range(num_layers)])
        self.num_rows, self.capacity = num_rows, capacity

    def begin_step(self, positions: Tensor, length: int) -> None:
        """Announce a forward of one token per row: `positions` [R] int64, `length` = their maximum + 1."""
        rows = torch.arange(len(positions), device=positions.device)
        for layer in self.layers:
            layer.rows, layer.positions, layer.length = rows, positions, length

    def reserve(self, num_rows: int, capacity: int) -> None:
        """Make room for so many rows and so many positions in each; what the rows hold is kept."""
        num_rows, capacity = max(num_rows, self.num_rows), max(capacity, self.capacity)
        more_rows, more = num_rows - self.num_rows, capacity - self.capacity
        if not (more_rows or more):
            return
        for layer in self.layers:
            if layer.is_initialized:
                layer.keys = F.pad(layer.keys, (0, 0, 0, more, 0, 0, 0, more_rows))
                layer.values = F.pad(layer.values, (0, 0, 0, more, 0, 0, 0, more_rows))
            layer.num_rows, layer.capacity = num_rows, capacity
        self.num_rows, self.capacity = num_rows, capacity

    def insert(self, first_row: int, prompts: DynamicCache, prompt_of_row: Tensor, num_pads: Tensor) -> None:
        """Fill rows first_row.. with prompts from a left-padded prefill.

        `prompt_of_row` [N] is the prefill row that each new row copies, `num_pads` [N] the padding in front of it.
        """
        rows = slice(first_row, first_row + len(prompt_of_row))
        length = prompts.get_seq_length()
        # Row i reads from num_pads[i] on; past the end of the prompt the last position repeats, which the mask hides.
        source = (torch.arange(length, device=num_pads.device) + num_pads[:, None]).clamp_(max=length - 1)
        for layer, prefilled in zip(self.layers, prompts.layers, strict=True):
            if not layer.is_initialized:
                layer.lazy_initialization(prefilled.keys, prefilled.values)
            layer.keys[rows, :, :length] = prefilled.keys[prompt_of_row[:, None], :, source].transpose(1, 2)
            layer.values[rows, :, :length] = prefilled.values[prompt_of_row[:, None], :, source].transpose(1, 2)

    def move(self, source_rows: Tensor, target_rows: Tensor, length: int) -> None:
        """Copy the first `length` positions of rows [N] onto other rows [N]."""
        for layer in self.layers:
            layer.keys[target_rows, :, :length] = layer.keys[source_rows, :, :length]
            layer.values[target_rows, :, :length] = layer.values[source_rows, :, :length]


def grouped_sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention of one query token per row without repeating keys and values per query head.

    The H/K query heads that share a key head stand in the query-length dimension, where they see the same keys. transformers'
    own sdpa repeats keys and values in memory whenever there is a mask, about 15 times slower on CPU. Longer queries
    (prefill) go there.
    """
    batch, num_heads, query_length, head_dim = query.shape
    if query_length > 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    grouped = query.reshape(batch, key.shape[1], num_heads // key.shape[1], head_dim)
    output = F.scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=kwargs.get("scaling"))
    return output.reshape(batch, 1, num_heads, value.shape[3]), None


def register_attention() -> None:
    """Make `grouped_sdpa` known to transformers as an `attn_implementation`; may be called again."""
    AttentionInterface.register(ATTENTION, grouped_sdpa)
