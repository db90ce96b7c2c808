"""What a run has trained, brought to Hugging Face."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.tools import Tool

NUM_PROMPT_TOKENS, NUM_TOKENS = 4, 16


def test_the_exported_model_gives_the_log_probs_that_the_actor_had_when_it_saved(
    folder: Path, whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(folder)  # the quick start's model.path is relative
    tool, out = Tool(monkeypatch, capsys), tmp_path / "trained"
    outcome = tool("megatron-to-hf", whole_run, out)
    assert outcome.code == 0, outcome.err
    assert "step 30" in outcome.out and "1 recorded settings agree" in outcome.out
    assert tool("verify", whole_run, out).code == 0

    checkpoint = whole_run / "checkpoints" / "step_000030"
    canary = json.loads((checkpoint / "actor" / "canary.json").read_text())
    temperature = json.loads((whole_run / "config.json").read_text())["config"]["rollout"]["temperature"]
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    found = []
    for index in range(2):  # the canary's batch
        tokens = torch.from_numpy((7 * np.arange(NUM_TOKENS) + 13 * index + 3) % model.config.vocab_size)
        with torch.no_grad():
            log_probs = torch.log_softmax(model(tokens[None]).logits[0, :-1] / temperature, dim=-1)
        found += log_probs.gather(1, tokens[1:, None])[NUM_PROMPT_TOKENS - 1 :, 0].tolist()
    np.testing.assert_allclose(found, canary["log_probs"], atol=1e-4)

    monkeypatch.chdir(tmp_path)
    outcome = tool("megatron-to-hf", whole_run, tmp_path / "again")
    assert outcome.code == 2 and "which is not here; give the folder of its config.json with --hf-config" in outcome.error
