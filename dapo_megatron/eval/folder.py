"""The folder of an evaluation, which a killed one goes on from.

OUT/settings.json    what the results depend on, and where they come from
OUT/problems.jsonl   one ProblemRecord per line, in the order in which the problems were finished
OUT/summary.json     written when all problems are there
OUT/logs/            output of ranks and engines
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from dapo_megatron.eval.records import ProblemRecord
from dapo_megatron.types import CheckpointError, ConfigError
from dapo_megatron.whole_files import write_whole

SETTINGS, PROBLEMS, SUMMARY = "settings.json", "problems.jsonl", "summary.json"


class EvaluationFolder:
    """A folder opened for one evaluation; a context manager, because it is locked meanwhile."""

    def __init__(self, path: Path, settings: Mapping[str, Any], about: Mapping[str, Any]):
        """Creates the folder, or goes on with one of the same `settings` (plain JSON values by name); `about` is only noted.

        Raises ConfigError with one sentence for each setting that differs, or when another process has the folder open.
        CheckpointError when a line in problems.jsonl is no record.
        """
        self.path = path
        self.logs = path / "logs"
        self._settings: dict[str, Any] = json.loads(json.dumps(dict(settings)))
        self._about = dict(about)
        self.num_correct: dict[int, int] = {}
        """Evaluated problem -> its correct responses."""

    def __enter__(self) -> Self:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._file = (self.path / PROBLEMS).open("ab")
        except OSError as error:
            raise ConfigError(
                f"--out ({self.path}) must be a folder that can be written ({error.strerror}); choose another."
            ) from None
        try:
            self._lock()
            self._compare_settings()
            self._cut_torn_line()
            self.num_correct = {record.problem: record.num_correct for record in self.records()}
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def add(self, record: ProblemRecord) -> None:
        """Append a problem: durable on return."""
        self._file.write(record.to_json().encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.num_correct[record.problem] = record.num_correct

    def records(self) -> Iterator[ProblemRecord]:
        """All problems evaluated so far, one at a time. CheckpointError for a line that is none."""
        path = self.path / PROBLEMS
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    record = ProblemRecord.from_json(line)
                except (ValueError, KeyError, TypeError):
                    raise CheckpointError(
                        f"{path}, line {number} is not a problem that `evaluate` wrote; remove the line to evaluate that problem again."
                    ) from None
                yield record

    def write_summary(self, summary: Mapping[str, Any]) -> Path:
        """Write summary.json with the settings beside the numbers; returns its path."""
        file = self.path / SUMMARY
        _write(file, {**summary, "settings": self._settings, "about": self._about})
        return file

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"another process evaluates into {self.path}; wait for it, or give another folder with --out."
            ) from None

    def _compare_settings(self) -> None:
        file = self.path / SETTINGS
        if not file.is_file():
            if self._file.tell():
                raise ConfigError(f"{self.path} holds {PROBLEMS} but no {SETTINGS}; give another folder with --out.")
            _write(file, {"settings": self._settings, "about": self._about})
            return
        try:
            saved = json.loads(file.read_text())["settings"]
        except (ValueError, KeyError, TypeError):
            raise ConfigError(
                f"{file} is not what `evaluate` writes; give another folder with --out, or remove this one."
            ) from None
        differences = [
            f"{name} is {json.dumps(self._settings.get(name))}, but the evaluation in {self.path} has {json.dumps(saved.get(name))}; "
            "put it back to go on with that one, or give another folder with --out."
            for name in {**saved, **self._settings}
            if saved.get(name) != self._settings.get(name)
        ]
        if differences:
            raise ConfigError(differences)

    def _cut_torn_line(self) -> None:
        """Drop a last line that a crash left unfinished."""
        path = self.path / PROBLEMS
        with path.open("rb") as file:
            size = sum(len(line) for line in file if line.endswith(b"\n"))
        if size < path.stat().st_size:
            os.truncate(path, size)


def _write(path: Path, content: Mapping[str, Any]) -> None:
    write_whole(path, json.dumps(content, indent=2) + "\n", durable=True)
