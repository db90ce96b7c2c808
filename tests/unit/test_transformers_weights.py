"""The tensors of the files as views of a transformers model, whose experts are stacked in memory."""

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from dapo_megatron.config.checks import read_hf_config
from dapo_megatron.rollout.transformers_weights import hf_views
from dapo_megatron.types import MappingError
from dapo_megatron.weights.plan import compile_mapping
from tests.tiny_models import MOE_FAMILIES, make_hf_model

SIZES = {"num_hidden_layers": 2}


@pytest.mark.parametrize("family", [*MOE_FAMILIES, "qwen2"])
def test_every_tensor_of_the_files_is_a_view_of_the_model(tmp_path: Path, family: str):
    folder = make_hf_model(tmp_path, family, **SIZES)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    views = hf_views(held, compile_mapping(read_hf_config(folder)).hf_tensors)
    saved = load_file(folder / "model.safetensors")
    assert views.keys() == saved.keys()
    for name, tensor in saved.items():
        assert torch.equal(views[name], tensor), name
        views[name].zero_()
    assert not any(parameter.any() for parameter in model.parameters())


def test_model_that_holds_other_tensors_is_refused():
    with pytest.raises(
        MappingError, match=r"mlp.experts.down_proj must hold .*0.down_proj.weight, .* in 12 elements, but is missing"
    ):
        hf_views({}, {f"layer.mlp.experts.{expert}.down_proj.weight": (2, 3) for expert in range(2)})
    with pytest.raises(MappingError, match=r"norm.weight must hold norm.weight in 4 elements, but is of shape \(3,\)"):
        hf_views({"norm.weight": torch.zeros(3)}, {"norm.weight": (4,)})
