"""What a person sees of an evaluation: progress with the time left, then a table."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from dapo_megatron.eval.records import ProblemRecord
from dapo_megatron.eval.summary import Summary

SECONDS_BETWEEN_LINES = 10.0
"""Without a terminal: a line at most so often, and one for the last problem."""


class EvaluationProgress:
    """Counts finished problems. A bar on a terminal, plain lines elsewhere. A context manager."""

    def __init__(
        self,
        num_problems: int,
        num_samples: int,
        done: Mapping[int, int],
        console: Console,
        clock: Callable[[], float] = time.monotonic,
    ):
        """`done`: problem -> correct responses, of an earlier part of this evaluation; `clock` gives seconds."""
        self._num_problems, self._num_samples, self._clock, self._console = num_problems, num_samples, clock, console
        self._num_done, self._num_correct, self._num_before = len(done), sum(done.values()), len(done)
        self._start = self._last_line = clock()
        self._bar = Progress(
            TextColumn("problems"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=num_problems, completed=len(done))

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()

    def generating(self) -> None:
        """The time left is estimated from here on: loading is over."""
        self._start = self._last_line = self._clock()

    def add(self, record: ProblemRecord) -> None:
        """One more problem is finished."""
        self._num_done += 1
        self._num_correct += record.num_correct
        self._bar.update(self._task, completed=self._num_done, description=self._state())
        now, is_last = self._clock(), self._num_done == self._num_problems
        if not self._console.is_terminal and (is_last or now - self._last_line >= SECONDS_BETWEEN_LINES):
            self._last_line = now
            self._console.print(
                f"{self._num_done}/{self._num_problems} problems, {self._state()}", highlight=False, soft_wrap=True
            )

    def seconds_left(self) -> float:
        """At the pace since `generating`."""
        elapsed = self._clock() - self._start
        return elapsed / (self._num_done - self._num_before) * (self._num_problems - self._num_done)

    def _state(self) -> str:
        accuracy = self._num_correct / (self._num_done * self._num_samples)
        return f"accuracy so far {accuracy:.3f}, {timedelta(seconds=round(self.seconds_left()))} left"


def print_summary(summary: Summary, title: str, places: Mapping[str, Path], console: Console) -> None:
    """The table at the end, and where everything lies."""
    table = Table(title=title, title_justify="left")
    table.add_column("metric")
    table.add_column("value", justify="right")
    table.add_column("standard error", justify="right")
    for name, estimate in summary.rows():
        error = "-" if estimate.standard_error is None else f"{estimate.standard_error:.4f}"
        table.add_row(name, f"{estimate.value:.4f}", error)
    if summary.majority is None:
        table.add_row(f"maj@{summary.num_samples}", "no answers to count", "-")
    table.add_section()
    table.add_row("response length, mean", f"{summary.response_length_mean_tokens:,.1f} tokens", "")
    table.add_row("response length, median", f"{summary.response_length_median_tokens:,.0f} tokens", "")
    table.add_row("response length, longest", f"{summary.response_length_max_tokens:,} tokens", "")
    table.add_row("truncated", f"{100 * summary.truncated_fraction:.2f} %", "")
    if summary.unanswered_fraction is not None:
        table.add_row("no answer stated", f"{100 * summary.unanswered_fraction:.2f} %", "")
    table.add_row("verdicts by default (time-out, ...)", f"{summary.num_reward_errors}", "")
    console.print(table)
    if summary.sampling_standard_error is not None:
        console.print(
            f"The standard error is over problems; when the same problems are answered again, that of avg@{summary.num_samples} "
            f"is {summary.sampling_standard_error:.4f}.",
            highlight=False,
            soft_wrap=True,
        )
    for name, place in places.items():
        console.print(f"{name:12} {place}", highlight=False, soft_wrap=True, markup=False)
