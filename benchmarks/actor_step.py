"""Forward and backward of one actor rank (TP1) against transformers: SmolLM2's shape, 4 sequences of 256 tokens, fp32, all cores.

    python -m benchmarks.actor_step --model-dir HF_DIR
    python -m benchmarks.actor_step --model-dir HF_DIR --ranks 2

Both live in one process and take turns; no prompt is shared, so every token is computed on both sides. With `--ranks` the step is done by
that many tensor-parallel ranks, processes that share the cores, and once more by transformers in the first one while the others wait.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

from dapo_megatron.config.schema import Config
from dapo_megatron.types import OptimizerStepBatch, TrainSample

NUM_SEQUENCES, NUM_TOKENS = 4, 256


def main() -> None:
    """Print the medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-dir", type=Path, required=True, help="HF directory, e.g. that of configs/smollm2_gsm8k.yaml")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=1, help="actor.tensor_parallel_size")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = (arguments.model_dir, arguments.repetitions, arguments.ranks, f"file://{folder}/rendezvous")
        context = multiprocessing.get_context("spawn")
        others = [context.Process(target=measure, args=(rank, *run)) for rank in range(1, arguments.ranks)]
        for process in others:
            process.start()
        measure(0, *run)
        for process in others:
            process.join()


def measure(rank: int, model_dir: Path, repetitions: int, num_ranks: int, init_method: str) -> None:
    """One rank; the first one prints."""
    from dapo_megatron.launcher.rank import build_rank

    config = Config.model_validate(
        {
            "model": {"path": model_dir, "dtype": "fp32"},
            "data": {"path": "unused"},
            "actor": {
                "num_threads": max(1, (os.cpu_count() or 1) // num_ranks),
                "tensor_parallel_size": num_ranks,
                "pad_query_groups": num_ranks > 1,
            },
        }
    )
    worker = build_rank(config, rank=rank, init_method=init_method, frozen=False)

    import torch
    import torch.distributed as dist
    from transformers import AutoModelForCausalLM

    from dapo_megatron.actor.step import train_micro_batches

    policy = worker.policy
    tokens = np.random.default_rng(0).integers(0, policy.architecture.vocab_size, (NUM_SEQUENCES, NUM_TOKENS)).astype(np.int32)
    samples = tuple(TrainSample(row, 1, np.zeros(NUM_TOKENS - 1, np.float32), 1.0, 1.0) for row in tokens)
    micro_batches = worker.tensors(OptimizerStepBatch(((samples,),), NUM_SEQUENCES * (NUM_TOKENS - 1)))
    ids = torch.from_numpy(tokens.astype(np.int64))
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32) if rank == 0 else None

    def ours() -> None:
        torch.set_num_threads(config.actor.num_threads)
        policy.zero_grad()
        train_micro_batches(policy.chunks, micro_batches, policy.head, config.algo, None)

    def plain() -> None:
        if model is not None:
            torch.set_num_threads(os.cpu_count() or 1)
            model.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()

    seconds: dict[str, list[float]] = {"dapo-megatron": [], "transformers": []}
    for repetition in range(repetitions + 1):
        for name, step in (("dapo-megatron", ours), ("transformers", plain)):
            dist.barrier()
            start = time.perf_counter()
            step()
            if repetition:  # the first one warms up
                seconds[name].append(time.perf_counter() - start)
    if rank == 0:
        print(f"{num_ranks} ranks, {os.cpu_count()} cores, torch {version('torch')}, transformers {version('transformers')}")
        for name, times in seconds.items():
            print(f"{name:14} {statistics.median(times):.2f} s (min {min(times):.2f}, max {max(times):.2f}, n {len(times)})")
        print(f"ratio {statistics.median(seconds['transformers']) / statistics.median(seconds['dapo-megatron']):.2f}")
    worker.close()


if __name__ == "__main__":
    main()
