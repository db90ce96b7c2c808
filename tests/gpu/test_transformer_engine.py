"""The TransformerEngine layer spec against plain transformers. Needs a GPU; one rank."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.distributed import oracle, programs
from tests.distributed.batches import cut, random_samples
from tests.distributed.ranks import run_ranks
from tests.tiny_models import make_hf_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(find_spec("transformer_engine") is None, reason="needs the extra te: pip install dapo-megatron[te]"),
]


@pytest.mark.parametrize("family", ["llama3_tied", "qwen2", "qwen3"])
def test_bf16_gradients_of_transformer_engine_follow_the_fp32_oracle(tmp_path: Path, family: str):
    model = make_hf_model(tmp_path / family, family)
    config = programs.make_config(model, dtype="bf16", use_distributed_optimizer=False)
    config = config.model_copy(update={"model": config.model.model_copy(update={"transformer_impl": "transformer_engine"})})
    batch = cut(random_samples(), num_ranks=1, samples_per_micro_batch=4)
    (result,) = run_ranks(programs.first_step, 1, config, batch)
    loss, gradients = oracle.first_step_gradients(oracle.load(model), batch)
    statistics = result["statistics"]
    assert statistics.loss_sum / statistics.num_loss_tokens == pytest.approx(loss, rel=0.02)
    for name, expected in gradients.items():
        got = result["gradients"][name]
        assert (got * expected).sum() / (np.linalg.norm(got) * np.linalg.norm(expected)) > 0.98, name
