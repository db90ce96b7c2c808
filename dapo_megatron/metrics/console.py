"""What a person sees of a run: a progress bar, one aligned line per rollout step, a summary with where things lie."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from dapo_megatron.metrics.names import STEP_KEY

HEADER_EVERY = 20
SUMMARY_STEPS = 10

Row = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Column:
    """One column of the step line; `text` raises KeyError when a metric was not measured."""

    title: str
    width: int
    text: Callable[[Row], str]


COLUMNS = (
    Column("step", 4, lambda row: f"{row[STEP_KEY]:.0f}"),
    Column("sec", 6, lambda row: _short(row["time/step_seconds"], digits=2)),
    Column("reward", 6, lambda row: f"{row['rollout/reward']:.3f}"),
    Column("accuracy", 8, lambda row: f"{row['rollout/accuracy']:.3f}"),
    Column("length", 6, lambda row: _short(row["rollout/response_length_tokens"], digits=1)),
    Column("entropy", 7, lambda row: f"{row['actor/entropy_nats']:.3f}"),
    Column("grad norm", 9, lambda row: f"{row['actor/grad_norm']:.3g}"),
    Column("clip l/h %", 10, lambda row: f"{_percent(row, 'low')}/{_percent(row, 'high')}"),
    Column("kept/drop", 9, lambda row: f"{row['rollout/num_groups_kept']:.0f}/{_dropped(row):.0f}"),
    Column("tok/s", 6, lambda row: f"{row['throughput/tokens_per_second']:.0f}"),
)
"""80 characters with the spaces between. A value that was not measured is shown as a dash."""


class RunConsole:
    """Prints a run as it goes. Without a terminal: the same lines, no bar.

    Use as a context manager; call `step` once per rollout step, `note` for anything else, `finish` at the end.
    """

    def __init__(self, num_rollout_steps: int, *, num_steps_done: int = 0, console: Console | None = None):
        """`num_steps_done` rollout steps lie behind a resumed run."""
        self._console = console or Console()
        self._progress = Progress(
            TextColumn("rollout steps"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("", total=num_rollout_steps, completed=num_steps_done)
        self._num_lines = 0
        self._recent: deque[Row] = deque(maxlen=SUMMARY_STEPS)
        self._num_tokens = 0.0
        self._seconds = 0.0

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def step(self, row: Row) -> None:
        """One line for a finished rollout step: `rollout_step` and the metrics of `metrics.names`."""
        if self._num_lines % HEADER_EVERY == 0:
            self._print(" ".join(f"{column.title:>{column.width}}" for column in COLUMNS), style="bold")
        self._print(" ".join(f"{_cell(column, row):>{column.width}}" for column in COLUMNS))
        self._num_lines += 1
        self._recent.append(row)
        self._num_tokens += row.get("rollout/num_tokens_generated", 0)
        self._seconds += row.get("time/step_seconds", 0)
        self._progress.update(self._task, completed=row[STEP_KEY])

    def note(self, text: str) -> None:
        """A line between the steps: a warning, a saved checkpoint."""
        self._print(text, style="yellow")

    def finish(self, run_dir: Path, *, tensorboard: bool) -> None:
        """Summary of the last steps, and where everything lies."""
        self._progress.stop()
        table = Table(title=f"Mean of the last {len(self._recent)} rollout steps", show_header=False, title_justify="left")
        for name in (
            "rollout/accuracy",
            "eval/accuracy",
            "rollout/reward",
            "rollout/response_length_tokens",
            "actor/entropy_nats",
        ):
            values = [row[name] for row in self._recent if name in row]
            if values:
                table.add_row(name, f"{sum(values) / len(values):.4f}")
        table.add_row("rollout steps in this process", f"{self._num_lines}")
        table.add_row("tokens generated", f"{self._num_tokens:,.0f}")
        table.add_row("seconds in steps", f"{self._seconds:.1f}")
        self._console.print(table)
        places = {"run folder": run_dir, "metrics": run_dir / "metrics.jsonl", "checkpoints": run_dir / "checkpoints"}
        for name, place in places.items():
            self._print(f"{name:12} {place}")
        if tensorboard:
            self._print(f"{'curves':12} tensorboard --logdir {run_dir / 'tensorboard'}")

    def _print(self, text: str, style: str | None = None) -> None:
        self._console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def _cell(column: Column, row: Row) -> str:
    try:
        return column.text(row)
    except KeyError:
        return "-"


def _short(value: float, digits: int) -> str:
    return f"{value:.{digits if value < 1000 else 0}f}"


def _percent(row: Row, side: str) -> str:
    return f"{100 * row[f'actor/clip_fraction_{side}']:.2f}"


def _dropped(row: Row) -> float:
    return row["rollout/num_groups_all_correct"] + row["rollout/num_groups_all_wrong"]
