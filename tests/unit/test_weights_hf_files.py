import json
import logging

import pytest
import torch
from safetensors.torch import save_file

from dapo_megatron.types import CheckpointError, MappingError
from dapo_megatron.weights.hf_files import HfFiles
from dapo_megatron.weights.plan import compile_mapping
from tests.unit.weights_simulation import LLAMA_TIED, LLAMA_UNTIED, identity_fill


@pytest.fixture
def tensors():
    return {name: torch.from_numpy(tensor).float() for name, tensor in identity_fill(LLAMA_TIED).items()}


@pytest.fixture
def mapping():
    return compile_mapping(LLAMA_TIED)


def save_single(directory, tensors):
    save_file(tensors, directory / "model.safetensors")
    return directory


def save_sharded(directory, tensors):
    weight_map = {}
    names = list(tensors)
    for shard, start in enumerate(range(0, len(names), 5)):
        file = f"model-{shard}.safetensors"
        save_file({name: tensors[name] for name in names[start : start + 5]}, directory / file)
        weight_map |= dict.fromkeys(names[start : start + 5], file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


@pytest.mark.parametrize("save", [save_single, save_sharded])
def test_whole_tensors_and_slices_are_read_from_one_or_many_files(tmp_path, tensors, mapping, save):
    files = HfFiles(save(tmp_path, tensors))
    assert files.check(mapping) == {}
    for name, tensor in tensors.items():
        assert torch.equal(files.read(name), tensor)
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(files.read(name, (slice(3, 9), slice(4, 8))), tensors[name][3:9, 4:8])
    assert torch.equal(files.read("model.norm.weight", (slice(2, 5),)), tensors["model.norm.weight"][2:5])


def test_dtype_of_the_file_is_kept(tmp_path, tensors, mapping):
    files = HfFiles(save_single(tmp_path, {name: tensor.bfloat16() for name, tensor in tensors.items()}))
    files.check(mapping)
    assert files.tensors["model.norm.weight"].dtype == "BF16"
    assert files.read("model.norm.weight", (slice(0, 2),)).dtype == torch.bfloat16


def test_missing_tensor_is_refused(tmp_path, tensors, mapping):
    del tensors["model.layers.1.input_layernorm.weight"]
    with pytest.raises(MappingError, match=r"lacks model\.layers\.1\.input_layernorm\.weight"):
        HfFiles(save_single(tmp_path, tensors)).check(mapping)


def test_tensor_of_another_shape_is_refused(tmp_path, tensors, mapping):
    tensors["model.norm.weight"] = torch.zeros(17)
    with pytest.raises(MappingError, match=r"model\.norm\.weight has shape \(17,\), its config\.json asks for \(16,\)"):
        HfFiles(save_single(tmp_path, tensors)).check(mapping)


def test_extra_tensor_is_refused(tmp_path, tensors, mapping):
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(16)
    with pytest.raises(MappingError, match=r"has model\.layers\.0\.self_attn\.q_proj\.bias"):
        HfFiles(save_single(tmp_path, tensors)).check(mapping)


def test_quantised_tensor_is_refused(tmp_path, tensors, mapping):
    tensors["model.norm.weight"] = torch.zeros(16, dtype=torch.int8)
    with pytest.raises(MappingError, match=r"model\.norm\.weight is I8"):
        HfFiles(save_single(tmp_path, tensors)).check(mapping)


def test_rotary_buffers_are_left_out_with_a_reason(tmp_path, tensors, mapping, caplog):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    tensors[name] = torch.zeros(2)
    with caplog.at_level(logging.WARNING):
        ignored = HfFiles(save_single(tmp_path, tensors)).check(mapping)
    assert "computed from the config" in ignored[name]
    assert name in caplog.text


def test_equal_head_of_a_tied_model_is_left_out_with_a_reason(tmp_path, tensors, mapping):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    ignored = HfFiles(save_single(tmp_path, tensors)).check(mapping)
    assert ignored.keys() == {"lm_head.weight"}


def test_head_that_differs_from_the_embedding_it_is_tied_to_is_refused(tmp_path, tensors, mapping):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["lm_head.weight"][20, 15] += 1
    with pytest.raises(MappingError, match=r"set tie_word_embeddings to false"):
        HfFiles(save_single(tmp_path, tensors)).check(mapping)


def test_head_of_an_untied_model_is_required(tmp_path, tensors):
    with pytest.raises(MappingError, match=r"lacks lm_head\.weight"):
        config = LLAMA_TIED | {"tie_word_embeddings": LLAMA_UNTIED["tie_word_embeddings"]}
        HfFiles(save_single(tmp_path, tensors)).check(compile_mapping(config))


def test_reading_a_tensor_that_is_not_there_is_refused(tmp_path, tensors):
    with pytest.raises(CheckpointError, match="has no tensor nothing"):
        HfFiles(save_single(tmp_path, tensors)).read("nothing")


def test_directory_without_weights_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"must have model\.safetensors, pytorch_model\.bin or an index of either"):
        HfFiles(tmp_path)


@pytest.mark.parametrize("sharded", [False, True])
def test_pytorch_bin_is_read_by_slices(tmp_path, tensors, mapping, sharded):
    names = list(tensors)
    files = {"a.bin": names[:5], "b.bin": names[5:]} if sharded else {"pytorch_model.bin": names}
    for file, of_file in files.items():
        torch.save({name: tensors[name] for name in of_file}, tmp_path / file)
    weight_map = {name: file for file, of_file in files.items() for name in of_file}
    if sharded:
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    read = HfFiles(tmp_path)
    assert read.check(mapping) == {}
    for name, tensor in tensors.items():
        assert torch.equal(read.read(name), tensor)
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(read.read(name, (slice(3, 9), slice(4, 8))), tensors[name][3:9, 4:8])


class Command:
    def __reduce__(self):
        return print, ("unpickled",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model.norm.weight": Command()}, r"pytorch_model\.bin holds more than weights.*save_pretrained"),
        ([torch.zeros(2)], r"pytorch_model\.bin holds a list, and must hold tensors by name"),
        ({"model.norm.weight": torch.zeros(4, 4).t()}, r"model\.norm\.weight must be a contiguous tensor"),
        ({"model.norm.weight": 3}, r"model\.norm\.weight must be a contiguous tensor"),
    ],
)
def test_pytorch_bin_with_anything_but_plain_weights_is_refused(tmp_path, capsys, content, message):
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=message):
        HfFiles(tmp_path)
    assert "unpickled" not in capsys.readouterr().out


def test_damaged_pytorch_bin_is_named(tmp_path, tensors):
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    content = (tmp_path / "pytorch_model.bin").read_bytes()
    for damaged in (content[:-100], content[:100], b""):
        (tmp_path / "pytorch_model.bin").write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"pytorch_model\.bin cannot be read .*get the file again"):
            HfFiles(tmp_path)


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"weight_map": {"a": "../model.safetensors"}}', '{"weight_map": {"a": 1}}']
)
def test_an_index_that_is_none_is_named(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"index\.json (is no index of weights|places a in)"):
        HfFiles(tmp_path)


def test_missing_shard_is_named(tmp_path, tensors):
    (save_sharded(tmp_path, tensors) / "model-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors cannot be read"):
        HfFiles(tmp_path)


def test_truncated_file_is_named(tmp_path, tensors):
    path = save_single(tmp_path, tensors) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        HfFiles(tmp_path)


def test_index_that_names_a_tensor_the_file_lacks_is_refused(tmp_path, tensors):
    index = save_sharded(tmp_path, tensors) / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.extra"] = "model-0.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"model-0\.safetensors lacks model\.extra"):
        HfFiles(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header: header["a"].update(data_offsets=[8, 24]), r"a starts at byte \d+, the tensor before it ends at \d+"),
        (lambda header: header["b"].update(shape=[4]), r"cannot be read \(it ends within b: it is truncated\)"),
        (lambda header: header["b"].update(shape=[2]), r"its tensors end at byte \d+ of \d+"),
        (lambda header: header["b"].update(dtype="C64"), r"b has the dtype C64, which is none of"),
        (lambda header: header["b"].update(shape=["3"]), r"its header is damaged"),
        (lambda header: header["b"].pop("dtype"), r"its header is damaged: KeyError\('dtype'\)"),
    ],
)
def test_a_header_that_contradicts_itself_or_the_file_is_refused_by_tensor(tmp_path, change, message):
    header = {
        "a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
        "b": {"dtype": "F32", "shape": [3], "data_offsets": [16, 28]},
    }
    change(header)
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(28))
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read .*" + message.removeprefix(r"cannot be read ")):
        HfFiles(tmp_path)
