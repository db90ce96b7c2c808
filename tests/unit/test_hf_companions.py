"""The files beside the weights of an HF directory."""

from __future__ import annotations

from pathlib import Path

from checkpoint_tools.hf_companions import copy_companions


def test_everything_but_weights_indices_and_hidden_files_is_copied(tmp_path: Path):
    source = tmp_path / "hf"
    kept = ["additional_chat_templates/tool.jinja", "chat_template.jinja", "config.json", "modeling_x.py", "tokenizer.json"]
    weights = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "model.gguf"]
    for name in [*kept, *weights, ".gitattributes", "onnx/config.json", "manifest.json"]:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(f"content of {name}")
    assert list(copy_companions(source, tmp_path / "copy")) == kept
    copied = {str(path.relative_to(tmp_path / "copy")) for path in (tmp_path / "copy").rglob("*") if path.is_file()}
    assert copied == set(kept)
    assert all((tmp_path / "copy" / name).read_text() == f"content of {name}" for name in kept)
