"""The configurations that ship."""

from pathlib import Path

import pytest

from dapo_megatron.config.checks import check_config
from dapo_megatron.config.load import load_config

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
OVER = {"aime2024": "dapo_qwen2.5_32b"}
"""Configs that are laid over another."""


def test_shipped_configs_are_found():
    quick = {"quickstart", "quickstart_moe", "quickstart_sglang"}
    assert {file.stem for file in CONFIGS} >= quick | {"smollm2_gsm8k", "dapo_qwen2.5_32b", "aime2024"}


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_shipped_config_loads_and_lacks_nothing_but_its_files(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = OVER.get(file.stem, file.stem)
    config = load_config([file.with_stem(base), file] if base != file.stem else [file])
    hf_configs = {
        "quickstart": {"num_attention_heads": 4, "num_hidden_layers": 4, "intermediate_size": 128},
        "quickstart_sglang": {"num_attention_heads": 4, "num_hidden_layers": 4, "intermediate_size": 128},
        "quickstart_moe": {
            "model_type": "qwen3_moe",
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "intermediate_size": 128,
            "num_attention_heads": 4,
            "num_hidden_layers": 4,
        },
        "smollm2_gsm8k": {
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "num_hidden_layers": 30,
            "intermediate_size": 1536,
            "max_position_embeddings": 8192,
        },
        "dapo_qwen2.5_32b": {
            "num_attention_heads": 40,
            "num_key_value_heads": 8,
            "num_hidden_layers": 64,
            "intermediate_size": 27648,
            "max_position_embeddings": 131072,
        },
    }
    sizes = {"model_type": "llama", "hidden_size": 64, "vocab_size": 14, "max_position_embeddings": 64} | hf_configs[base]
    missing_files = ("model.path", "data.path", "eval.path")
    assert [problem for problem in check_config(config, sizes) if not problem.startswith(missing_files)] == []
