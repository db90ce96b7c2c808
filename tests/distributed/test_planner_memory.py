"""The planner's memory against what real megatron-core ranks hold, byte by byte.

The local layer spec of these ranks is another set of kernels than TransformerEngine's, and keeps other tensors: the planner lists both
(`layout/kept_local.py`, `layout/kept_transformer_engine.py`). Everything else is the same on CPUs and GPUs: shards, buffers and their
padding, and how many passes a pipeline holds.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pytest

from dapo_megatron.config.schema import Config
from dapo_megatron.layout.activations import layer_activations
from dapo_megatron.layout.layout import FULL_RECOMPUTE, NO_RECOMPUTE, Layout
from dapo_megatron.layout.lm_head import head_memory
from dapo_megatron.layout.memory import plan_memory
from dapo_megatron.layout.memory_records import MemoryOptions, Precision
from dapo_megatron.layout.model_shape import ModelShape
from dapo_megatron.layout.states import stage_states
from dapo_megatron.types import TrainBatch, TrainSample
from tests.distributed.batches import cut
from tests.distributed.measured_memory import measure
from tests.distributed.programs import make_config
from tests.distributed.ranks import run_ranks
from tests.tiny_models import make_hf_model

SIZES = {"hidden_size": 128, "intermediate_size": 320, "vocab_size": 250}
NUM_PROMPT_TOKENS, NUM_RESPONSE_TOKENS, SAMPLES_PER_MICRO_BATCH = 17, 48, 2
SEQUENCE_TOKENS = NUM_PROMPT_TOKENS + NUM_RESPONSE_TOKENS - 1
"""The last token of a response predicts nothing."""


@dataclass(frozen=True, slots=True)
class Case:
    """A family under a layout."""

    name: str
    family: str
    actor: dict[str, Any]
    dtype: str = "bf16"
    num_micro_batches: int = 4


CASES = (
    Case("tp2_sp", "qwen3", {"tensor_parallel_size": 2, "sequence_parallel": True}),
    Case("tp2_fp32", "llama", {"tensor_parallel_size": 2}, dtype="fp32"),
    Case("pp2", "llama", {"pipeline_parallel_size": 2}),
    Case("pp2_vpp2", "llama3_tied", {"pipeline_parallel_size": 2, "virtual_pipeline_size": 2}),
    Case("pp2_full_recompute", "llama", {"pipeline_parallel_size": 2, "recompute": "full"}),
    Case("dp2", "qwen2", {"num_ranks": 2}),
    # Routing is not balanced within a micro-batch; over all tokens of the ranks it is what the planner counts.
    Case("ep2", "qwen3_moe", {"num_ranks": 2, "expert_parallel_size": 2}, num_micro_batches=1),
    Case("latent_attention_tp2_sp", "deepseek_v3", {"tensor_parallel_size": 2, "sequence_parallel": True}, num_micro_batches=1),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_real_ranks_hold_what_is_planned(tmp_path: Path, case: Case):
    config = make_config(make_hf_model(tmp_path / "model", case.family, **SIZES), case.dtype, **case.actor)
    shape = ModelShape.from_hf(json.loads((config.model.path / "config.json").read_text()))
    layout, options = _layout(config, case), _options(case)
    ranks = run_ranks(measure, config.actor.world_size, config, _batch(config, case))

    planned = stage_states(shape, layout, options)
    for rank in ranks:
        states = planned[rank.stage]
        assert (rank.weight_bytes, rank.grad_bytes) == (states.weight_bytes, states.grad_bytes)
        assert rank.optimizer_bytes == states.optimizer_bytes
    plan = plan_memory(shape, layout, 80 * 2**30, options)
    for stage in plan.stages:
        items = {item.name: item.num_bytes for item in stage.phases[0].items}
        kept = sum(num_bytes for name, num_bytes in items.items() if name.startswith("activations"))
        is_last = stage.stage == layout.pipeline_parallel_size - 1
        head = round(head_memory(shape, layout, options).kept_bytes) if is_last else 0
        if layout.recompute.granularity == "full":  # the head is through its backward pass when the last layer is built again
            kept += max(head, round(_live_layer_bytes(shape, layout, options)))
        else:
            kept += head
        measured = mean(rank.saved_bytes for rank in ranks if rank.stage == stage.stage)
        assert kept == pytest.approx(measured, rel=0.02)


def _live_layer_bytes(shape: ModelShape, layout: Layout, options: MemoryOptions) -> float:
    """What full recompute has built again of the layer at work."""
    return layer_activations(shape, False, layout, options).kept * layout.tokens_per_rank


def _layout(config: Config, case: Case) -> Layout:
    actor = config.actor
    return Layout(
        tensor_parallel_size=actor.tensor_parallel_size,
        pipeline_parallel_size=actor.pipeline_parallel_size,
        virtual_pipeline_size=actor.virtual_pipeline_size,
        expert_parallel_size=actor.expert_parallel_size,
        expert_tensor_parallel_size=actor.expert_tensor_parallel_size,
        data_parallel_size=actor.data_parallel_size,
        sequence_parallel=actor.sequence_parallel,
        max_tokens_per_micro_batch=SAMPLES_PER_MICRO_BATCH * SEQUENCE_TOKENS,
        num_micro_batches=case.num_micro_batches,
        recompute=FULL_RECOMPUTE if actor.recompute == "full" else NO_RECOMPUTE,
    )


def _options(case: Case) -> MemoryOptions:
    fp32 = Precision(weight_bytes=4, activation_bytes=4, master_bytes=0)
    return MemoryOptions(
        kernels="local",
        precision=fp32 if case.dtype == "fp32" else Precision(),
        flash_attention="latent" not in case.name,
        sequence_tokens=SEQUENCE_TOKENS,
        expert_imbalance=1.0,
    )


def _batch(config: Config, case: Case) -> TrainBatch:
    """Samples of equal length, each of a prompt of its own."""
    rng = np.random.default_rng(0)
    num_ranks = config.actor.data_parallel_size
    samples = [
        TrainSample(
            token_ids=rng.integers(0, SIZES["vocab_size"], NUM_PROMPT_TOKENS + NUM_RESPONSE_TOKENS),
            num_prompt_tokens=NUM_PROMPT_TOKENS,
            rollout_log_probs=-rng.random(NUM_RESPONSE_TOKENS),
            advantage=1.0,
            loss_weight=1.0,
        )
        for _ in range(SAMPLES_PER_MICRO_BATCH * case.num_micro_batches * num_ranks)
    ]
    return cut(samples, num_ranks=num_ranks, samples_per_micro_batch=SAMPLES_PER_MICRO_BATCH)
