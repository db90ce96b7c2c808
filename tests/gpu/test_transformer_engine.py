"""The TransformerEngine layer spec against plain transformers: one rank, and a packed sequence cut over two."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dapo_megatron.actor.replayed import Replay
from dapo_megatron.config.schema import Config
from dapo_megatron.types import TrainBatch
from tests.distributed import oracle, programs
from tests.distributed.batches import cut, random_samples
from tests.distributed.ranks import run_ranks
from tests.tiny_models import make_hf_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(find_spec("transformer_engine") is None, reason="needs the extra te: pip install dapo-megatron[te]"),
]


NUM_GPUS = torch.cuda.device_count()


def train_on_own_gpu(rank: int, init_method: str, config: Config, batch: TrainBatch) -> Replay | None:
    torch.cuda.set_device(rank)
    return programs.load_and_replay(rank, init_method, config, batch)[1]


@pytest.mark.parametrize("family", ["llama3_tied", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    "layout",
    [
        {},
        pytest.param(
            {"context_parallel_size": 2}, marks=pytest.mark.skipif(NUM_GPUS < 2, reason=f"needs 2 CUDA devices, not {NUM_GPUS}")
        ),
    ],
    ids=["one_rank", "cp2"],
)
def test_bf16_gradients_of_transformer_engine_follow_the_fp32_oracle(tmp_path: Path, family: str, layout: dict[str, Any]):
    """Heads as wide as kernels take them. Packs have sequences of odd lengths, and some that are shorter than two chunks a rank."""
    model = make_hf_model(tmp_path / family, family, hidden_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=64)
    plain = programs.make_config(model, "bf16", **layout)
    config = plain.model_copy(update={"model": plain.model.model_copy(update={"transformer_impl": "transformer_engine"})})
    batch = cut(random_samples(), num_ranks=1, samples_per_micro_batch=4)
    got = run_ranks(train_on_own_gpu, config.actor.world_size, config, batch)[0]
    want = oracle.train(model, config, batch).updates[0]
    assert got.updates[0].num_loss_tokens == want.num_loss_tokens
    assert got.updates[0].loss == pytest.approx(want.loss, rel=0.02)
    for name, expected in want.gradients.items():
        gradient = got.gradients[name]
        assert (gradient * expected).sum() / (np.linalg.norm(gradient) * np.linalg.norm(expected)) > 0.98, name
