"""Core attention of the local layer spec, on torch's scaled_dot_product_attention: runs on CPU and GPU, padded-free.

megatron-core's own DotProductAttention has no packed form and builds the whole score matrix.
"""

from __future__ import annotations

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import embedding, scaled_dot_product_attention

from dapo_megatron.models.context_parallel import ContextParallelSequences
from dapo_megatron.models.packed import PackedSequences
from dapo_megatron.models.rope import rotate


class PackedSelfAttention(MegatronModule):
    """Causal attention inside each packed sequence: query [T, 1, heads, d], key and value [T, 1, groups, d] -> [T, 1, heads * d].

    T is the pack, heads and groups are this tensor-parallel rank's. Latent attention leaves the axis of length 1 out, and its
    values may be of another width. Under context parallelism T is this rank's part; keys and values of the other ranks are gathered.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: object,
    ):
        super().__init__(config=config)
        self.softmax_scale = softmax_scale
        self.context_group = None if pg_collection is None else pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSequences | None = None,
    ) -> Tensor:
        assert packed_seq_params is not None
        if packed_seq_params.rotation is not None:
            query, key = (rotate(x, *packed_seq_params.rotation) for x in (query, key))
        slots = (
            self._slots_over_ranks(query, key, value, packed_seq_params)
            if isinstance(packed_seq_params, ContextParallelSequences)
            else [_rows(x.flatten(1), packed_seq_params.gather).unflatten(1, x.shape[-2:]) for x in (query, key, value)]
        )
        grouped = query.shape[-2] != key.shape[-2]
        shapes = packed_seq_params.tile_shapes
        masks = packed_seq_params.tile_masks or (None,) * len(shapes)
        outputs, first, first_key = [], 0, 0
        for (num_sequences, longest), num_keys, mask in zip(shapes, packed_seq_params.num_keys, masks, strict=True):
            last, last_key = first + num_sequences * longest, first_key + num_sequences * num_keys
            places = (slice(first, last), slice(first_key, last_key), slice(first_key, last_key))
            q, k, v = (x[of].unflatten(0, (num_sequences, -1)).transpose(1, 2) for x, of in zip(slots, places, strict=True))
            # Right padding needs no mask: under causal attention no real token looks at a later slot.
            out = scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.softmax_scale, enable_gqa=grouped
            )
            outputs.append(out.transpose(1, 2).flatten(0, 1))
            first, first_key = last, last_key
        joined = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
        return _rows(joined.flatten(1), packed_seq_params.scatter).unsqueeze(1)

    def _slots_over_ranks(self, query: Tensor, key: Tensor, value: Tensor, pack: ContextParallelSequences) -> list[Tensor]:
        """Keys and values of all ranks in one gather; its backward sums their gradients and scatters them."""
        widths = key.shape[-2:].numel(), value.shape[-2:].numel()
        both = torch.cat((key.flatten(1), value.flatten(1)), dim=1)
        rows = _rows(gather_from_sequence_parallel_region(both, group=self.context_group), pack.key_gather)
        keys, values = rows.split(widths, dim=1)
        return [
            _rows(query.flatten(1), pack.gather).unflatten(1, query.shape[-2:]),
            keys.unflatten(1, key.shape[-2:]),
            values.unflatten(1, value.shape[-2:]),
        ]

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """No parameters."""
        return {}


def _rows(table: Tensor, indices: Tensor | None) -> Tensor:
    """Of a table [rows, width]; None: all of them. As an embedding, whose backward adds up rows in parallel; index_select's does not."""
    return table if indices is None else embedding(indices, table)
