"""The hash of shards on a GPU is that of a CPU."""

from __future__ import annotations

import pytest
import torch

from dapo_megatron.weights import place_hash
from dapo_megatron.weights.place_hash import PlaceHash

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_devices_agree_on_any_part(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(place_hash.CHUNK_WORDS, "cuda", 1000)
    tensor = torch.randn(37, 203).to(dtype)
    on_cpu, on_gpu = (PlaceHash([(37, 203)], dtype, torch.device(device)) for device in ("cpu", "cuda"))
    for rows, columns in ((slice(0, 37), slice(0, 203)), (slice(5, 30), slice(4, 200)), (slice(1, 2), slice(3, 6))):
        part = tensor[rows, columns]
        expected = on_cpu.of(part, (rows, columns))
        assert on_gpu.of(part.cuda(), (rows, columns)).cpu() == expected == on_gpu.of(part, (rows, columns)).cpu()
