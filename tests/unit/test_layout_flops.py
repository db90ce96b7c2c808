"""FLOPs of a layout's model against an independent count: torch's own of every product of a real model, forward and backward."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from dapo_megatron.layout.flops import forward_flops, training_flops
from dapo_megatron.layout.model_shape import ModelShape
from tests.tiny_models import FAMILIES, MOE_FAMILIES, SIZES

NUM_TOKENS = 96
PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.addmm}
ATTENTION = {torch.ops.aten.bmm}
"""Of whole matrices of scores, where the convention counts the causal half."""


def counted(config: transformers.PreTrainedConfig, *, backward: bool) -> float:
    """FLOPs of one sequence by torch's counter, attention halved."""
    config._attn_implementation, config._experts_implementation = "eager", "eager"
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with FlopCounterMode(display=False) as counter:
        logits = model(torch.arange(NUM_TOKENS)[None] % config.vocab_size, use_cache=False).logits
        if backward:
            logits.sum().backward()
    counts = counter.get_flop_counts()["Global"]
    assert counts.keys() <= PRODUCTS | ATTENTION, "every product is of one of these kinds"
    products, attention = (sum(counts.get(kind, 0) for kind in kinds) for kinds in (PRODUCTS, ATTENTION))
    return products + attention / 2


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("family", [*FAMILIES, *MOE_FAMILIES])
def test_flops_are_those_of_the_products_of_a_real_model(family: str, backward: bool):
    config = {**FAMILIES, **MOE_FAMILIES}[family](**SIZES)
    shape = ModelShape.from_hf(json.loads(config.to_json_string(use_diff=False)))
    ours = training_flops if backward else forward_flops
    assert ours(shape, NUM_TOKENS, NUM_TOKENS**2) == pytest.approx(counted(config, backward=backward), rel=1e-3)
