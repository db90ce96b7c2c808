"""Weights that a server takes out of the memory of the sender's GPU: mapped where both share it, over NCCL from another one."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from dapo_megatron.config.schema import SglangEngineConfig
from dapo_megatron.rollout.sglang_server import ServerSpec, SglangServer
from dapo_megatron.types import EngineEndpoint
from dapo_megatron.weights.transports.channel import StagedBucket, plain_entries
from dapo_megatron.weights.transports.records import PushRules, Transport
from tests.distributed.programs import make_config
from tests.distributed.ranks import run_ranks
from tests.sglang import weight_sync_ranks
from tests.tiny_models import make_hf_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(find_spec("sglang") is None, reason="pip install dapo-megatron[sglang]"),
    pytest.mark.timeout(400),
]


def read_as_a_server_does(payloads: list[str], results: Any) -> None:
    from sglang.srt.utils.common import MultiprocessingSerializer
    from sglang.srt.utils.patch_torch import monkey_patch_torch_reductions

    monkey_patch_torch_reductions()
    for payload in payloads:
        bucket = MultiprocessingSerializer.deserialize(payload)
        flat = bucket["flattened_tensor"]
        assert flat.is_cuda
        results.put(
            {
                record.name: flat[record.start_idx : record.end_idx].view(record.dtype).reshape(record.shape).tolist()
                for record in bucket["metadata"]
            }
        )


def test_another_process_reads_the_memory_of_this_gpu_once_for_each_rank():
    from dapo_megatron.weights.transports.tensor import pickled

    entries = plain_entries([("a", (2, 3)), ("b", (4,))], "bfloat16")
    payload = torch.arange(10, dtype=torch.bfloat16, device="cuda").view(torch.uint8)
    bucket = StagedBucket(1, 0, True, entries, payload)
    torch.cuda.synchronize()
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    reader = context.Process(target=read_as_a_server_does, args=([pickled(bucket), pickled(bucket)], results))
    reader.start()
    try:
        expected = {name: tensor.tolist() for name, tensor in bucket.tensors().items()}
        assert [results.get(timeout=120) for _ in range(2)] == [expected] * 2
    finally:
        reader.join(30)
        reader.kill()


@contextmanager
def served(folder: Path, gpu_id: int) -> Iterator[EngineEndpoint]:
    model = make_hf_model(folder / "model", "qwen3", num_hidden_layers=2)
    config = SglangEngineConfig(dtype="bf16", max_total_tokens=4096, mem_fraction_static=0.2)
    spec = ServerSpec(name="engine 0", model_dir=model, config=config, extra={}, device="cuda", gpu_ids=(gpu_id,))
    server = SglangServer(spec, folder / "log")
    try:
        yield replace(server.start(300), gpu_ids=(gpu_id,))
    finally:
        server.stop()


@pytest.mark.parametrize(("transport", "gpu_id"), [("tensor", 0), ("distributed", 1)])
def test_a_server_holds_what_the_rank_has_sent_from_its_gpu(tmp_path: Path, transport: Transport, gpu_id: int):
    """The rank is on GPU 0. The push compares the hashes of all tensors; the ranks' program wipes the server's before each version."""
    if torch.cuda.device_count() <= gpu_id:
        pytest.skip("needs two GPUs: NCCL takes no two ranks on one")
    with served(tmp_path, gpu_id) as endpoint:
        config = make_config(tmp_path / "model", "bf16")
        rules = PushRules(bucket_bytes=100_000, dtype="bfloat16")
        versions = {version: {endpoint: transport} for version in (1, 2)}
        reports = run_ranks(weight_sync_ranks.push, 1, config, versions, rules, 0)[0]
    assert [report.failures for report in reports] == [{}, {}]
