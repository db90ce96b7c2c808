"""A version of the weights from two tensor-parallel actor ranks to a SGLang server with one, by each transport.

    python -m benchmarks.weight_sync --shape smollm2-135m

Ranks and server are real, weights are random; seconds are those of `WeightPusher.push`, hashes compared. The ratio is to a plain copy of
as many bytes from host memory to host memory, measured in the same process. Each version is also sent without the comparison of what was
gathered with what the ranks hold (`PushRules.check_shards`), in turns.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from dapo_megatron.config.schema import Config, SglangEngineConfig
from dapo_megatron.rollout.sglang_server import ServerSpec, SglangServer
from dapo_megatron.types import EngineEndpoint
from dapo_megatron.weights.transports.records import PushReport, PushRules, Transport

SHAPES = {
    "smollm2-135m": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "qwen2-1.5b": {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
}
COMMON = {
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
}
TRANSPORTS: tuple[Transport, ...] = ("tensor", "distributed", "disk")
NUM_RANKS = 2
type Reports = dict[tuple[Transport, bool], list[tuple[PushReport, float]]]
"""By transport and whether shards were checked; beside each report, the CPU seconds of rank 0."""


def main(device: Literal["cpu", "cuda"] = "cpu", description: str | None = __doc__) -> None:
    """Print a row for each transport. On GPUs rank i has GPU i, the server the next one, and it sees that of rank 0."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--bucket-mib", type=int, default=128)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--no-hashes", action="store_true", help="do not compare what the server holds")
    parser.add_argument("--transports", nargs="+", choices=TRANSPORTS, default=TRANSPORTS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(COMMON | SHAPES[arguments.shape]))
        spec = ServerSpec(
            name="engine 0",
            model_dir=folder,
            config=SglangEngineConfig(dtype="bf16", max_total_tokens=4096, mem_fraction_static=0.3 if device == "cuda" else None),
            extra={"load_format": "dummy"},
            device=device,
            gpu_ids=(NUM_RANKS, 0) if device == "cuda" else None,
        )
        rules = PushRules(
            bucket_bytes=arguments.bucket_mib * 2**20,
            dtype="bfloat16",
            directory=folder / "versions",
            check_hashes=not arguments.no_hashes,
        )
        server = SglangServer(spec, folder / "server.log")
        try:
            endpoint = replace(server.start(600), gpu_ids=spec.gpu_ids or ())
            reports = _push(folder, endpoint, rules, arguments.transports, arguments.repetitions)
        finally:
            server.stop()
    first, _ = next(iter(reports.values()))[0]
    print(
        f"{os.cpu_count()} cores, torch {version('torch')}, sglang {version('sglang')}; {arguments.shape}, bf16, TP{NUM_RANKS} -> tp 1"
    )
    print(
        f"{first.num_bytes / 1e9:.3f} GB, memcpy {first.memcpy_seconds:.3f} s ({first.num_bytes / first.memcpy_seconds / 1e9:.1f} GB/s)"
    )
    for (transport, checks_shards), of_transport in reports.items():
        seconds = sorted(report.seconds for report, _ in of_transport)
        cpu_seconds = statistics.median(cpu for _, cpu in of_transport)
        median = statistics.median(seconds)
        shards, check = (
            statistics.median(getattr(report, field) for report, _ in of_transport)
            for field in ("shard_check_seconds", "check_seconds")
        )
        print(
            f"{transport:12} {median:.2f} s (min {seconds[0]:.2f}, max {seconds[-1]:.2f}, n {len(seconds)}), of these {check:.2f} s "
            f"after the last byte; {first.num_bytes / median / 1e9:.2f} GB/s, {median / first.memcpy_seconds:.1f} x memcpy; "
            f"{cpu_seconds:.2f} CPU s of rank 0, " + (f"{shards:.3f} s of shard check" if checks_shards else "no shard check")
        )


def _push(folder: Path, endpoint: EngineEndpoint, rules: PushRules, transports: Sequence[Transport], repetitions: int) -> Reports:
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue[Reports] = context.Queue()
    ranks = [
        context.Process(target=_rank, args=(rank, folder, endpoint, rules, transports, repetitions, results))
        for rank in range(NUM_RANKS)
    ]
    for rank in ranks:
        rank.start()
    try:
        while results.empty():
            if any(rank.exitcode for rank in ranks):
                raise SystemExit("a rank failed; its words are above")
            time.sleep(0.1)
        return results.get()
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()


def _rank(
    rank: int,
    folder: Path,
    endpoint: EngineEndpoint,
    rules: PushRules,
    transports: Sequence[Transport],
    repetitions: int,
    results: multiprocessing.Queue,
) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = str(rank) if endpoint.gpu_ids else ""

    from dapo_megatron.actor import cpu_adapter

    cpu_adapter.install()
    import torch

    from dapo_megatron.actor.live_weights import live_boxes
    from dapo_megatron.actor.parallel import initialize
    from dapo_megatron.actor.policy import build_modules
    from dapo_megatron.actor.weight_pusher import WeightPusher
    from dapo_megatron.models.architecture import Architecture
    from dapo_megatron.weights.plan import compile_mapping

    config = Config.model_validate(
        {
            "model": {"path": folder, "dtype": "bf16", "transformer_impl": "local"},
            "data": {"path": "unused"},
            "actor": {"tensor_parallel_size": NUM_RANKS, "pad_query_groups": True},
        }
    )
    hf_config = json.loads((folder / "config.json").read_text())
    device = initialize(config, rank=rank, init_method=f"file://{folder}/rendezvous")
    modules, _ = build_modules(Architecture.from_hf(hf_config), config, device)
    live = live_boxes(modules)
    torch.manual_seed(0)  # copies on other ranks are equal
    for item in live:
        item.data.normal_(std=0.02)
    mapping = compile_mapping(hf_config)
    pushers = {
        checks_shards: WeightPusher(mapping, hf_config, live, replace(rules, check_shards=checks_shards))
        for checks_shards in (True, False)
    }
    reports: Reports = {(transport, checks_shards): [] for transport in transports for checks_shards in pushers}
    number = 0
    for repetition in range(repetitions + 1):
        for (transport, checks_shards), of_kind in reports.items():
            number += 1
            cpu = time.process_time()
            report = pushers[checks_shards].push(number, {endpoint: transport}, gpu_id=rank if endpoint.gpu_ids else None)
            if report is not None:
                if report.failures:
                    raise SystemExit(f"{transport}: {report.failures}")
                if repetition:  # the first one warms up
                    of_kind.append((report, time.process_time() - cpu))
    if rank == 0:
        results.put(reports)


if __name__ == "__main__":
    main()
