"""Fit the shares of `layout/efficiency.py` to published step times, and say how well they predict what they have not seen.

    python -m benchmarks.planner_fit path/to/layouts.csv

One set of shares a generation of devices, nothing else: a pattern search on the root mean square of logarithmic errors, held near where measured
kernels of any generation are. Then, for every model in turn, the shares are fitted without its rows and its rows are predicted.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, median

from benchmarks.layout_rows import read_rows
from benchmarks.planner_time import TimedRow, TimeScore, timed_rows
from dapo_megatron.layout.efficiency import EFFICIENCIES, Efficiency

NEUTRAL = Efficiency(0.65, 0.48, 0.38, 0.85, 0.55, 0.80, 5e-6, "where large kernels of any generation are")
FITTED = ("matmul", "attention_forward", "attention_backward", "memory", "link")
PULL = 0.2
"""Error that an excursion of a share by a factor e from NEUTRAL must save, times the number of rows."""
MEASURED: Mapping[str, Mapping[str, float]] = {"hopper": {"attention_forward": 0.60, "attention_backward": 0.50, "memory": 0.84}}
"""Shares of a generation that kernels alone are known to reach, so that no step time needs to say them. Hopper: attention of head width 128 and 2k
to 16k tokens takes 595 to 648 TFLOP/s forward (FlashAttention-3 and cuDNN 9, arXiv 2407.08608, figure 5), backward 1.5 to 1.75 times
FlashAttention-2's; streaming kernels 2.8 of 3.35 TB/s, which is also what generation reads its cache with."""
STEPS = (1.15, 1.05, 1.02)
HIGHEST = 0.95


def fit(rows: Sequence[TimedRow]) -> Efficiency:
    """The shares with the smallest error and pull, of rows of one generation; those that are MEASURED stay."""
    measured = MEASURED.get(rows[0].gpu.efficiency, {})
    best = replace(NEUTRAL, **measured)
    loss = _loss(rows, best)
    for step in STEPS:
        improved = True
        while improved:
            improved = False
            for name in (name for name in FITTED if name not in measured):
                for factor in (step, 1 / step):
                    tried = replace(best, **{name: min(HIGHEST, getattr(best, name) * factor)})
                    found = _loss(rows, tried)
                    if found < loss - 1e-6:
                        best, loss, improved = tried, found, True
    return best


def _loss(rows: Sequence[TimedRow], shares: Efficiency) -> float:
    errors = [math.log1p(row.score(shares).error) for row in rows]
    pull = sum(math.log(getattr(shares, name) / getattr(NEUTRAL, name)) ** 2 for name in FITTED)
    return math.sqrt(mean(error**2 for error in errors)) + PULL * pull / len(rows)


def _print_errors(words: str, scores: Sequence[TimeScore]) -> None:
    errors = [abs(score.error) for score in scores]
    print(f"  {words}: {len(errors)} rows, median |error| {median(errors):.1%}, mean {mean(errors):.1%}, worst {max(errors):.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layouts", type=Path, help="CSV file of published layouts")
    rows, _ = timed_rows(read_rows(parser.parse_args().layouts))
    for generation in EFFICIENCIES:
        own = [row for row in rows if row.gpu.efficiency == generation]
        if not own:
            continue
        shares = fit(own)
        print(f"{generation}: " + ", ".join(f"{name} {getattr(shares, name):.2f}" for name in FITTED))
        _print_errors("fit", [row.score(shares) for row in own])
        models = sorted({row.variants[0].model for row in own})
        unseen: list[TimeScore] = []
        for model in models if len(models) > 1 else []:
            without = fit([row for row in own if row.variants[0].model != model])
            unseen += [row.score(without) for row in own if row.variants[0].model == model]
        if unseen:
            _print_errors("each model predicted from the others", unseen)


if __name__ == "__main__":
    main()
