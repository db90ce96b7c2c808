"""Forward and backward of one actor rank (TP1) against transformers: SmolLM2's shape, 4 sequences of 256 tokens, fp32, all cores.

    python -m benchmarks.actor_step --model-dir HF_DIR

Both live in one process and take turns; no prompt is shared, so every token is computed on both sides.
"""

from __future__ import annotations

import argparse
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
    arguments = parser.parse_args()

    from dapo_megatron.actor import cpu_adapter

    cpu_adapter.install()
    import torch
    from transformers import AutoModelForCausalLM

    from dapo_megatron.actor.step import train_micro_batches
    from dapo_megatron.actor.worker import ActorWorker

    config = Config.model_validate(
        {
            "model": {"path": arguments.model_dir, "dtype": "fp32"},
            "data": {"path": "unused"},
            "actor": {"num_threads": os.cpu_count()},
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        worker = ActorWorker(config, rank=0, init_method=f"file://{folder}/rendezvous")
    policy = worker.policy
    tokens = np.random.default_rng(0).integers(0, policy.architecture.vocab_size, (NUM_SEQUENCES, NUM_TOKENS)).astype(np.int32)
    samples = tuple(TrainSample(row, 1, np.zeros(NUM_TOKENS - 1, np.float32), 1.0, 1.0) for row in tokens)
    micro_batches = worker.tensors(OptimizerStepBatch(((samples,),), NUM_SEQUENCES * (NUM_TOKENS - 1)))
    model = AutoModelForCausalLM.from_pretrained(arguments.model_dir, dtype=torch.float32)
    ids = torch.from_numpy(tokens.astype(np.int64))

    def ours() -> None:
        policy.zero_grad()
        train_micro_batches(policy.chunks, micro_batches, policy.head, config.algo, None)

    def plain() -> None:
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()

    seconds: dict[str, list[float]] = {"dapo-megatron": [], "transformers": []}
    for repetition in range(arguments.repetitions + 1):
        for name, step in (("dapo-megatron", ours), ("transformers", plain)):
            start = time.perf_counter()
            step()
            if repetition:  # the first one warms up
                seconds[name].append(time.perf_counter() - start)
    print(f"{os.cpu_count()} cores, torch {version('torch')}, transformers {version('transformers')}")
    for name, times in seconds.items():
        print(f"{name:14} {statistics.median(times):.2f} s (min {min(times):.2f}, max {max(times):.2f}, n {len(times)})")
    print(f"ratio {statistics.median(seconds['transformers']) / statistics.median(seconds['dapo-megatron']):.2f}")
    worker.close()


if __name__ == "__main__":
    main()
