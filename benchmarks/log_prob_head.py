"""The chunked LM head against full fp32 logits and log_softmax, forward and backward, at Qwen's vocabulary.

    python -m benchmarks.log_prob_head                 # 2048 rows
    python -m benchmarks.log_prob_head --rows 8192     # the naive side needs 16 GiB

Each side runs in a process of its own. Memory is the peak above what lies there before the call (inputs and weights); it includes
the gradients. Time is the best of the repetitions, which alternate between the sides.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import time
from importlib.metadata import version
from multiprocessing.connection import Connection

HIDDEN, VOCABULARY = 1024, 151_936
"""Of Qwen3-0.6B."""
CHUNK_TOKENS = 512


def peak_bytes() -> int:
    """Peak resident set of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_side(name: str, rows: int, turns: Connection) -> None:
    """Answer each turn with (seconds, bytes) of one forward and backward."""
    import torch

    from dapo_megatron.actor.log_probs import Vocabulary, head_loss

    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    hidden = torch.randn(rows, HIDDEN).requires_grad_()
    weight = torch.randn(VOCABULARY, HIDDEN).mul_(HIDDEN**-0.5).requires_grad_()
    targets = torch.randint(VOCABULARY, (rows,))

    def naive() -> torch.Tensor:
        return torch.log_softmax((hidden @ weight.t()).float(), dim=-1).gather(1, targets[:, None])[:, 0].sum()

    def chunked() -> torch.Tensor:
        vocabulary = Vocabulary(0, VOCABULARY, None)
        return head_loss(
            hidden,
            weight,
            targets,
            lambda log_probs, entropy, rows: log_probs.sum(),
            vocabulary=vocabulary,
            temperature=1.0,
            chunk_tokens=CHUNK_TOKENS,
        )[0]

    before = peak_bytes()
    while turns.recv():
        hidden.grad = weight.grad = None
        start = time.perf_counter()
        (naive if name == "naive" else chunked)().backward()
        seconds = time.perf_counter() - start
        assert hidden.grad is not None
        turns.send((seconds, peak_bytes() - before, hidden.grad.abs().sum().item()))


def main() -> None:
    """Both sides in turn; prints time, memory and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--repetitions", type=int, default=3)
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    sides = {}
    for name in ("naive", "chunked"):
        turns, other_end = context.Pipe()
        process = context.Process(target=run_side, args=(name, arguments.rows, other_end))
        process.start()
        sides[name] = (turns, process)
    results: dict[str, list[tuple[float, int, float]]] = {name: [] for name in sides}
    for _ in range(arguments.repetitions):
        for name, (turns, _) in sides.items():
            turns.send(True)
            results[name].append(turns.recv())
    for turns, process in sides.values():
        turns.send(False)
        process.join()
    seconds = {name: min(result[0] for result in of_side) for name, of_side in results.items()}
    memory = {name: max(result[1] for result in of_side) for name, of_side in results.items()}
    print(f"{os.cpu_count()} cores, torch {version('torch')}, {arguments.rows} rows x {HIDDEN} -> {VOCABULARY}, fp32")
    for name, of_side in results.items():
        times = ", ".join(f"{result[0]:.2f}" for result in of_side)
        print(f"{name:8} {seconds[name]:7.2f} s ({times})  {memory[name] / 2**30:6.2f} GiB  |grad| sum {of_side[-1][2]:.6e}")
    print(f"time {seconds['chunked'] / seconds['naive']:.2f} of naive, memory 1/{memory['naive'] / memory['chunked']:.1f}")


if __name__ == "__main__":
    main()
