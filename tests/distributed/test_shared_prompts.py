"""Attention over prompts that responses share: as trees and as sequences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.distributed.ranks import run_ranks

HEADS, GROUPS, WIDTH = 4, 2, 8


def attend_both_ways(rank: int, init_method: str, spans: np.ndarray) -> tuple[Any, ...]:
    """(as trees, as sequences): output and gradients of query, key and value each, and the shapes of the tiles."""
    import torch
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from dapo_megatron.models import shared_prompts
    from dapo_megatron.models.attention import PackedSelfAttention

    total = int((spans[:, [0, 2]] + spans[:, [1, 3]]).max())
    config = TransformerConfig(num_layers=1, hidden_size=HEADS * WIDTH, num_attention_heads=HEADS)
    attention = PackedSelfAttention(config, 1, AttnMaskType.causal, "self")
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(total, 1, heads, WIDTH, generator=generator) for heads in (HEADS, GROUPS, GROUPS)]
    weights = torch.randn(total, 1, HEADS * WIDTH, generator=generator)
    ways = []
    for longest_tree in (512, 0):
        shared_prompts._MAX_TREE_TOKENS = longest_tree
        pack = shared_prompts.SharedPrompts(*spans.T).pack(torch.device("cpu"))
        inputs = [tensor.clone().requires_grad_() for tensor in tensors]
        output = attention(*inputs, packed_seq_params=pack)
        (output * weights).sum().backward()
        results = [tensor.detach().numpy() for tensor in (output, pack.positions, *(x.grad for x in inputs))]
        ways.append((results, pack.tile_shapes))
    return tuple(ways)


@pytest.mark.parametrize(
    ("spans", "trees", "sequences"),
    [
        ([(0, 4, 4, 1), (0, 4, 5, 1), (0, 4, 6, 1), (7, 4, 11, 1), (7, 4, 12, 1), (7, 4, 13, 1)], ((2, 7),), ((6, 5),)),
        (
            [(0, 3, 3, 5), (8, 2, 10, 0), (0, 3, 10, 2), (8, 2, 12, 6), (18, 1, 0, 0)],
            ((2, 10), (1, 1)),
            ((3, 8), (1, 2), (1, 1)),
        ),
    ],
    ids=["equal", "unequal, apart, with padding"],
)
def test_responses_beside_one_trunk_are_what_they_are_behind_a_prompt_of_their_own(spans, trees, sequences):
    ((as_trees, tree_shapes), (as_sequences, sequence_shapes)) = run_ranks(attend_both_ways, 1, np.array(spans))[0]
    assert (tree_shapes, sequence_shapes) == (trees, sequences)
    for one, other in zip(as_trees, as_sequences, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6)
