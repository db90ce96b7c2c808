r"""How near the layout planner comes to published measurements.

    python -m benchmarks.planner                       the facts stored in benchmarks/data
    python -m benchmarks.planner path/to/layouts.csv   any file with the same columns, as benchmarks/data/held_out_layouts.csv: rows that
                                                       were found after the formulas were written

Memory: peak of torch's allocator on the fullest pipeline stage against the published one. The formulas were written while looking at the
rows marked `fit`; every other row is a prediction. Rows that say too little are listed with what they lack.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.layout_rows import FACTS, GIB, Refusal, RowInputs, inputs_of, read_rows, tidy, without_duplicates
from benchmarks.planner_time import gpu_of, print_errors, print_time
from dapo_megatron.layout.memory import reserved_bytes, train_allocated_bytes, train_needed_bytes, with_margin

_FIT = {"SimuMax": "B200", "mbridge": ""}
"""Framework -> the device whose rows the formulas were written with."""


@dataclass(frozen=True, slots=True)
class MemoryScore:
    """One row: predicted and published peak, in bytes."""

    inputs: RowInputs
    predicted_bytes: float
    published_bytes: float

    @property
    def error(self) -> float:
        """Relative, positive when the prediction is too high."""
        return self.predicted_bytes / self.published_bytes - 1

    @property
    def is_fit(self) -> bool:
        """The row was looked at while the formulas were written."""
        device = _FIT.get(self.inputs.framework)
        return device is not None and device in self.inputs.gpu


def predicted_peak(inputs: RowInputs) -> float:
    """Bytes, of what the row's peak counts and on the stages that it is of."""
    stages = train_allocated_bytes(inputs.shape, inputs.layout, inputs.options)
    if inputs.peak is not None and inputs.peak.ends_only:
        stages = (stages[0], stages[-1])
    allocated = max(stages)
    counter = "allocated" if inputs.peak is None else inputs.peak.counter
    if counter == "allocated":
        return allocated
    return reserved_bytes(allocated) if counter == "reserved" else with_margin(allocated, inputs.layout)


def score_memory(rows: list[dict[str, str]]) -> tuple[list[MemoryScore], list[tuple[str, str, str]]]:
    """Scores of the rows with a published peak, and (id, model, reason) of those that cannot be mapped."""
    mapped, refused = [], []
    for row in map(tidy, rows):
        if not row["peak_mem_GB"] or _is_computed(row):
            continue
        try:
            mapped.append(inputs_of(row))
        except Refusal as reason:
            refused.append((row["id"], row["model"], str(reason)))
    scores = [
        MemoryScore(one, predicted_peak(one), one.peak.num_bytes)
        for one in without_duplicates(mapped)
        if one.peak is not None and not one.ran_out_of_memory
    ]
    return scores, refused


def _is_computed(row: Mapping[str, str]) -> bool:
    """Of another estimator, not of a run."""
    return any(word in row["status"].lower() for word in ("predict", "simulat", "estimat"))


@dataclass(frozen=True, slots=True)
class FitScore:
    """Layouts on known devices by what happened and what the planner says; ids of the rows where both differ."""

    num_ran: int
    called_too_large: list[str]
    num_out_of_memory: int
    called_fitting: list[str]


def score_fit(rows: list[dict[str, str]]) -> FitScore:
    """Of the rows that can be mapped; a row with a measurement ran."""
    ran, too_large, failed, fitting = 0, [], 0, []
    for row in map(tidy, rows):
        try:
            inputs = inputs_of(row)
        except Refusal:
            continue
        gpu = gpu_of(inputs.gpu)
        if gpu is None:
            continue
        needed = train_needed_bytes(inputs.shape, inputs.layout, inputs.options)
        if inputs.ran_out_of_memory:
            failed += 1
            fitting += [inputs.row_id] if needed <= gpu.memory_bytes else []
        elif row["status"] == "measured":
            ran += 1
            too_large += [inputs.row_id] if needed > gpu.memory_bytes else []
    return FitScore(ran, too_large, failed, fitting)


def print_memory(rows: list[dict[str, str]]) -> None:
    """The table of `score_memory` with its means, and the refusals."""
    scores, refused = score_memory(rows)
    print(f"{'row':>5}  {'model':34} {'layout':28} {'GPU':12} {'published':>10} {'predicted':>10} {'error':>8}")
    for score in scores:
        one = score.inputs
        print(
            f"{one.row_id:>5}  {one.model[:34]:34} {str(one.layout)[:28]:28} {one.gpu[:12]:12} "
            f"{score.published_bytes / GIB:6.2f} GiB {score.predicted_bytes / GIB:6.2f} GiB {score.error:+8.2%}"
            f"  {'fit' if score.is_fit else 'prediction'}"
        )
    print_errors([(score.error, score.is_fit) for score in scores])
    fit = score_fit(rows)
    print(
        f"layouts that ran out of memory: {fit.num_out_of_memory}, called fitting: {len(fit.called_fitting)} {fit.called_fitting or ''}"
    )
    print(f"layouts that ran: {fit.num_ran}, called too large: {len(fit.called_too_large)} {fit.called_too_large or ''}")
    print(f"\nnot mapped: {len(refused)} rows")
    for reason, count in Counter(reason for _, _, reason in refused).most_common():
        ids = [row_id for row_id, _, other in refused if other == reason]
        print(f"  {count:3}  {reason} ({', '.join(ids[:8])}{', ...' if len(ids) > 8 else ''})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layouts", type=Path, nargs="?", default=FACTS, help="CSV file of published layouts")
    rows = read_rows(parser.parse_args().layouts)
    print_memory(rows)
    print_time(rows)


if __name__ == "__main__":
    main()
