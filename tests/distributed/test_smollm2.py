"""A real model: SmolLM2-135M-Instruct, 9 heads in 3 query groups, tied embeddings, on two tensor-parallel ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from dapo_megatron.types import OptimizerStepBatch, TrainBatch, TrainSample
from tests.distributed import oracle, programs
from tests.distributed.ranks import run_ranks
from tests.tools import Tool

pytestmark = pytest.mark.smollm2

TEXTS = (
    ("Natalia sold clips to 48 of her friends in April, and then half as many in May.", " She sold 48 + 24 = 72 clips."),
    ("The capital of France is", " Paris, on the river Seine."),
)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "layout", [{"tensor_parallel_size": 2, "pad_query_groups": True}, {"pipeline_parallel_size": 2}], ids=["tp2", "pp2"]
)
def test_log_probs_of_a_real_model_agree_with_transformers(smollm2_dir: Path, layout: dict):
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    samples = []
    for prompt, response in TEXTS:
        prompt_ids, response_ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, response))
        samples.append(TrainSample((*prompt_ids, *response_ids), len(prompt_ids), (0.0,) * len(response_ids), 1.0, 1.0))
    step = OptimizerStepBatch(((tuple(samples),),), sum(sample.num_loss_tokens for sample in samples))
    config = programs.make_config(smollm2_dir, **layout)
    results = run_ranks(programs.log_probs, 2, config, TrainBatch((step,)), timeout_seconds=240)
    ((trained, packed),) = next(copies for copies in results if copies is not None)
    reference = oracle.load(smollm2_dir)
    with torch.no_grad():
        expected = torch.cat([oracle.sequence_log_probs(reference, sample) for sample in samples])
    assert sorted(trained) == list(range(len(expected)))
    np.testing.assert_allclose(packed, expected.numpy()[trained], atol=1e-4)


@pytest.mark.timeout(300)
def test_the_checkpoint_tools_bring_a_real_model_back_bit_exact(
    smollm2_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    tool, megatron, back = Tool(monkeypatch, capsys), tmp_path / "megatron", tmp_path / "back"
    assert tool("hf-to-megatron", smollm2_dir, megatron, "--workers", 1).code == 0
    assert tool("megatron-to-hf", megatron, back, "--shard-size", "200MB", "--workers", 1).code == 0
    assert len(list(back.glob("model-*-of-00003.safetensors"))) == 3
    for a, num_hashes in ((megatron, 544), (smollm2_dir, 272)):
        outcome = tool("verify", a, back, "--workers", 1)
        assert outcome.code == 0, outcome.out
        assert "bit-exact: 272 of 272 tensors, 538 MB each" in outcome.out
        assert f"{num_hashes} hashes agree with what was recorded" in outcome.out
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (back / name).read_bytes() == (smollm2_dir / name).read_bytes()
