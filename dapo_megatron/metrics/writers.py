"""Where the metrics of a run go: metrics.jsonl always, TensorBoard and Weights & Biases when configured."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from dapo_megatron.config.schema import MetricsConfig
from dapo_megatron.metrics.names import STEP_KEY, require_known
from dapo_megatron.types import CheckpointError, ConfigError
from dapo_megatron.whole_files import write_whole

FILE_NAME = "metrics.jsonl"


class MetricsSink(Protocol):
    """One destination. Values are finite."""

    def write(self, rollout_step: int, values: Mapping[str, float]) -> None:
        """Record the values of a rollout step."""

    def forget_after(self, rollout_step: int) -> None:
        """Steps above this one will be written again."""

    def close(self) -> None:
        """Flush and release."""


class MetricsWriter:
    """Appends one row per rollout step: durable on return, each step once, only names of `METRICS`.

    metrics.jsonl is strict JSON: a value that is not finite is written as null and left out of the other sinks; a metric that was
    not measured in a step has no key.
    """

    def __init__(self, run_dir: Path, config: MetricsConfig):
        """Opens or creates `run_dir`/metrics.jsonl. Raises ConfigError when a configured sink is not installed."""
        self._path = run_dir / FILE_NAME
        run_dir.mkdir(parents=True, exist_ok=True)
        self._sinks: list[MetricsSink] = []
        if config.tensorboard:
            self._sinks.append(TensorBoardSink(run_dir / "tensorboard"))
        if config.wandb_project is not None:
            self._sinks.append(WandbSink(run_dir, config.wandb_project))
        self._last_step = self._rewrite(None)
        self._file = self._path.open("a", encoding="utf-8")

    def write(self, row: Mapping[str, float]) -> None:
        """Append a row: `rollout_step` and any of `METRICS`. Raises ValueError for an unknown name or a step out of order."""
        step = int(row[STEP_KEY])
        values = {name: value if isinstance(value, int) else float(value) for name, value in row.items() if name != STEP_KEY}
        require_known(values)
        if self._last_step is not None and step <= self._last_step:
            raise ValueError(f"rollout_step ({step}) must be above {self._last_step}, the last in {self._path}; truncate first.")
        record = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({STEP_KEY: step, **record}, allow_nan=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._last_step = step
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        for sink in self._sinks:
            sink.write(step, finite)

    def truncate_after(self, rollout_step: int) -> None:
        """Drop rows above `rollout_step`, which a resumed run will write again; 0 drops all. The file changes atomically."""
        self._file.close()
        self._last_step = self._rewrite(rollout_step)
        self._file = self._path.open("a", encoding="utf-8")
        for sink in self._sinks:
            sink.forget_after(rollout_step)

    def close(self) -> None:
        """Close the file and all sinks."""
        self._file.close()
        for sink in self._sinks:
            sink.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _rewrite(self, rollout_step: int | None) -> int | None:
        """Keep the rows up to a step (None: all complete rows); returns the last step kept."""
        rows = [row for row in read_metrics(self._path) if rollout_step is None or row[STEP_KEY] <= rollout_step]
        write_whole(self._path, "".join(json.dumps(row) + "\n" for row in rows), durable=True)
        return rows[-1][STEP_KEY] if rows else None


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a metrics.jsonl in order; none when there is no file. A last line that a crash cut off is left out.

    Raises CheckpointError when another line is no row.
    """
    if not path.exists():
        return
    *lines, _torn = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            row[STEP_KEY]
        except (ValueError, TypeError, KeyError):
            raise CheckpointError(
                f"{path}, line {number} must be a JSON object with {STEP_KEY}; remove the line to go on without it."
            ) from None
        yield row


class TensorBoardSink:
    """Scalars through TensorBoard's own event writer, which needs neither torch nor TensorFlow."""

    def __init__(self, directory: Path):
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._writer = EventFileWriter(str(directory))

    def write(self, rollout_step: int, values: Mapping[str, float]) -> None:
        """One event that holds all scalars of the step."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._writer.add_event(Event(wall_time=time.time(), step=rollout_step, summary=Summary(value=scalars)))
        self._writer.flush()

    def forget_after(self, rollout_step: int) -> None:
        """A session start makes TensorBoard hide earlier events from that step on."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        session = SessionLog(status=SessionLog.START)
        self._writer.add_event(Event(wall_time=time.time(), step=rollout_step + 1, session_log=session))
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


class WandbSink:
    """Weights & Biases. The run's id is kept in `run_dir`/wandb_id, so that a resumed run goes on in the same curves."""

    def __init__(self, run_dir: Path, project: str):
        try:
            import wandb
        except ImportError:
            raise ConfigError(
                f"metrics.wandb_project ({project}) needs the package wandb; install dapo-megatron[wandb] or set it to null."
            ) from None
        id_file = run_dir / "wandb_id"
        if not id_file.exists():
            id_file.write_text(wandb.util.generate_id())
        self._run = wandb.init(
            project=project, name=run_dir.name, id=id_file.read_text().strip(), resume="allow", dir=str(run_dir)
        )
        # Weights & Biases refuses a step counter that goes back; an axis of our own may.
        self._run.define_metric("*", step_metric=STEP_KEY)

    def write(self, rollout_step: int, values: Mapping[str, float]) -> None:
        """Log the values with `rollout_step` as their axis."""
        self._run.log({STEP_KEY: rollout_step, **values})

    def forget_after(self, rollout_step: int) -> None:
        """Rows cannot be taken back: repeated steps are drawn over the earlier ones."""

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()
