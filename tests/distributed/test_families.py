"""Families with experts and latent attention: what ranks load and compute is what transformers loads and computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.distributed import oracle, programs
from tests.distributed.batches import random_samples
from tests.distributed.ranks import run_ranks
from tests.tiny_models import MOE_FAMILIES, make_hf_model

TP2_SP = {"tensor_parallel_size": 2, "sequence_parallel": True}
PP2, VPP2 = {"pipeline_parallel_size": 2}, {"virtual_pipeline_size": 2}
EP2, ETP2 = {"expert_parallel_size": 2}, {"expert_tensor_parallel_size": 2}
CASES = [
    ("qwen3_moe", {"num_ranks": 2} | EP2),
    ("qwen3_moe", TP2_SP | ETP2),
    ("qwen3_moe", {"num_ranks": 4} | TP2_SP | EP2),
    ("qwen3_moe_some_dense", PP2 | VPP2),
    ("mixtral", {"num_ranks": 4} | TP2_SP | {"expert_parallel_size": 4}),
    ("mixtral", PP2),
    ("deepseek_v2", TP2_SP),
    ("deepseek_v2", {"num_ranks": 4} | PP2 | EP2),
    ("deepseek_v3", TP2_SP | EP2),
    ("deepseek_v3", {"tensor_parallel_size": 2}),
    ("deepseek_v3", PP2),
    ("moonlight", {"num_ranks": 2} | EP2),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("families")
    return {family: make_hf_model(folder / family, family) for family in MOE_FAMILIES}


def layout_name(value: Any) -> str:
    short = {"tensor_parallel_size": "tp", "pipeline_parallel_size": "pp", "expert_parallel_size": "ep"}
    short |= {"expert_tensor_parallel_size": "etp", "virtual_pipeline_size": "vpp", "num_ranks": "ranks"}
    return value if isinstance(value, str) else "_".join(f"{short.get(key, 'sp')}{int(size)}" for key, size in value.items())


@pytest.mark.parametrize(("family", "layout"), CASES, ids=layout_name)
def test_ranks_load_and_compute_what_transformers_does(models: dict[str, Path], family: str, layout: dict[str, Any]):
    """Weights come back bit by bit; fp32 logits agree to 1e-4 at every position of packed samples."""
    samples = tuple(random_samples(6))
    config = programs.make_config(models[family], **layout)
    results = run_ranks(programs.load_and_compute_logits, config.actor.world_size, config, samples)

    saved = load_file(models[family] / "model.safetensors")
    assert results[0][0].keys() == saved.keys()
    for name, tensor in saved.items():
        assert np.array_equal(results[0][0][name], tensor.numpy()), name

    reference = oracle.load(models[family])
    with torch.no_grad():
        wanted = torch.cat([oracle.sequence_logits(reference, sample) for sample in samples]).numpy()
    assert np.abs(wanted).max() > 1, "logits of a size that an error would show in"
    for _, logits in results:
        if logits is not None:
            np.testing.assert_allclose(logits, wanted, atol=1e-4)
