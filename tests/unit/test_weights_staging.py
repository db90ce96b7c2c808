"""A bucket as it lies in memory: plain, or quantised as an FP8 server wants it."""

from __future__ import annotations

import pytest
import torch

from dapo_megatron.types import EngineEndpoint
from dapo_megatron.weights.codecs import Fp8Codec, dequantise, fp8_codec, quantise
from dapo_megatron.weights.transports.channel import StagedBucket, encode, plain_entries, quantised_entries
from dapo_megatron.weights.transports.records import reads_gpu

WEIGHTS = {
    "q.weight": torch.randn(24, 12, generator=torch.Generator().manual_seed(0)),
    "q.bias": torch.arange(5.0),
    "k.weight": torch.randn(7, 9, generator=torch.Generator().manual_seed(1)),
    "norm.weight": torch.full((3,), 0.5),
}
"""Odd sizes: nothing is aligned by luck."""
CODEC = Fp8Codec((8, 8), frozenset({"q.weight", "k.weight"}))


def gathered() -> tuple[tuple, torch.Tensor]:
    entries = plain_entries([(name, tuple(tensor.shape)) for name, tensor in WEIGHTS.items()], "bfloat16")
    flat = torch.cat([tensor.bfloat16().reshape(-1).view(torch.uint8) for tensor in WEIGHTS.values()])
    return entries, flat


def quantised(codec: Fp8Codec = CODEC) -> StagedBucket:
    plain, flat = gathered()
    entries = quantised_entries(plain, codec)
    payload = torch.zeros(entries[-1].stop, dtype=torch.uint8)
    encode(plain, flat, entries, payload, codec)
    return StagedBucket(3, 0, True, entries, payload, codec)


def test_a_quantised_weight_goes_as_e4m3_and_its_scales():
    sent = quantised().tensors()
    assert sorted(sent) == ["k.weight", "k.weight_scale_inv", "norm.weight", "q.bias", "q.weight", "q.weight_scale_inv"]
    for name, tensor in WEIGHTS.items():
        if name in CODEC.names:
            weight, scales = quantise(tensor.bfloat16(), CODEC.block)
            assert torch.equal(sent[name].float(), weight.float()) and torch.equal(sent[f"{name}_scale_inv"], scales)
        else:
            assert torch.equal(sent[name], tensor.bfloat16())


def test_tensors_lie_one_behind_the_other_each_aligned_to_its_dtype():
    """A server that receives a broadcast works the places out of names, dtypes and shapes alone."""
    entries, end = quantised().entries, 0
    for entry in entries:
        assert entry.start == end and entry.start % getattr(torch, entry.dtype).itemsize == 0
        end = entry.stop
    plain, flat = gathered()
    assert end < plain[-1].stop == len(flat)


def test_hashes_are_of_weights_times_scales():
    reported = dict(quantised().reported())
    assert set(reported) == set(WEIGHTS)
    for name in CODEC.names:
        weight, scales = quantise(WEIGHTS[name].bfloat16(), CODEC.block)
        whole = tuple(slice(0, size) for size in weight.shape)
        assert torch.equal(reported[name], dequantise(weight, scales, whole, CODEC.block))


@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
def test_the_codec_of_a_model_is_read_from_its_config_and_its_files(scale_fmt: str | None):
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [8, 8], "scale_fmt": scale_fmt}}
    files = {"q.weight", "q.weight_scale_inv", "norm.weight"}
    assert fp8_codec(config, files) == Fp8Codec((8, 8), frozenset({"q.weight"}), scale_fmt == "ue8m0")
    assert fp8_codec({}, files) is None


def test_scales_that_are_powers_of_two_encode_again_to_the_same():
    """A server that wants such scales makes its own from what it is sent, and must find nothing to change."""
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    whole = (slice(0, 64), slice(0, 64))
    encoded, scales = quantise(weight, (8, 8), powers_of_two=True)
    assert (torch.frexp(scales)[0] == 0.5).all() and encoded.float().abs().max() <= 448
    decoded = dequantise(encoded, scales, whole, (8, 8))
    again = dequantise(*quantise(decoded, (8, 8), powers_of_two=True), whole, (8, 8))
    assert torch.equal(decoded, again)


@pytest.mark.parametrize(
    ("device", "gpu_ids", "transport", "gpu_id", "reads"),
    [
        ("cuda", (0, 1), "tensor", 0, True),
        ("cuda", (2, 3), "tensor", 0, False),
        ("cuda", (), "tensor", None, False),
        ("cuda", (5,), "distributed", 0, True),
        ("cuda", (0,), "disk", 0, False),
        ("cpu", (), "tensor", None, False),
        ("cpu", (), "distributed", 0, False),
    ],
)
def test_buckets_stay_on_the_gpu_for_servers_that_can_read_there(device, gpu_ids, transport, gpu_id, reads):
    endpoint = EngineEndpoint("engine 0", "http://10.0.0.1:1", 2, device, gpu_ids=gpu_ids)
    assert reads_gpu(endpoint, transport, gpu_id) is reads
