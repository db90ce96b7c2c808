"""A folder that appears under its name only when it is complete, and whose making can be taken up again after a kill.

    OUT.partial/journal.jsonl   line 1: what is being made from what; then one line for each finished task
    OUT.partial/output/         becomes OUT by one rename
    OUT.partial/replaced/       the old OUT for the moment between two renames, with --force

The journal is a list of claims: the caller compares each with the bytes in `output/` before it believes it.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from checkpoint_tools.byte_sizes import format_bytes
from checkpoint_tools.errors import writing
from dapo_megatron.types import CheckpointError

_JOURNAL, _OUTPUT, _REPLACED, _LOCK = "journal.jsonl", "output", "replaced", "lock"


def check_target(final: Path, force: bool) -> None:
    """Raise CheckpointError when `final` is taken, or cannot become a folder."""
    if (final.exists() or final.is_symlink()) and not force:
        raise CheckpointError(
            f"{final} exists; choose another folder, or give --force to replace it once the new one is complete"
        )
    if final.exists() and not final.is_dir():
        raise CheckpointError(f"{final} is a file, and must be a folder; choose another name")


def check_room(final: Path, num_bytes: int) -> None:
    """Raise CheckpointError when the disk of `final` has no room for what is still to be written there."""
    parent = existing_parent(final)
    partial = _partial(final)
    written = sum(file.stat().st_blocks * 512 for file in partial.rglob("*") if file.is_file()) if partial.is_dir() else 0
    free, missing = shutil.disk_usage(parent).free, num_bytes - written
    if missing > free:
        raise CheckpointError(
            f"{final} needs {format_bytes(missing)}, and {parent} has {format_bytes(free)} free; free some space or choose another disk"
        )


def existing_parent(path: Path) -> Path:
    """The nearest folder above `path` that exists."""
    return next(parent for parent in path.absolute().parents if parent.is_dir())


@contextmanager
def open_output(final: Path, identity: Mapping[str, Any], force: bool) -> Iterator[OutputFolder]:
    """Begin or take up the making of `final`, alone; the lock is released on leaving, the folder appears with `finish`.

    `identity` (JSON) says what is being made from what: unfinished work of another identity is refused, or thrown away with
    `force`. CheckpointError then, when the target exists without `force`, and when another process is at it; WriteError when
    the folder cannot be written.
    """
    check_target(final, force)
    partial = _partial(final)
    with writing(partial):
        partial.mkdir(parents=True, exist_ok=True)
        lock = (partial / _LOCK).open("w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"{partial} is being written by another process; wait for it or stop it") from None
        with writing(partial):
            _put_back(partial, final)
            folder = OutputFolder(final, partial, json.loads(json.dumps(identity)), force)
        try:
            yield folder
        finally:
            folder.close()


class OutputFolder:
    """`path` is where to write; `finished` is what the journal claims: task name -> record."""

    def __init__(self, final: Path, partial: Path, identity: Mapping[str, Any], force: bool) -> None:
        self.path = partial / _OUTPUT
        self._final, self._partial, self._force = final, partial, force
        lines = self._read_journal()
        if lines and lines[0] != identity:
            changed = sorted(key for key in {*lines[0], *identity} if lines[0].get(key) != identity.get(key))
            if not force:
                was, now = (_short({key: side.get(key) for key in changed}) for side in (lines[0], identity))
                raise CheckpointError(
                    f"{partial} holds unfinished work of another conversion ({was}; this one: {now}); "
                    "run that command again to finish it, delete the folder, or give --force to throw it away"
                )
            lines = []
        self.finished: dict[str, Any] = {line["name"]: line["record"] for line in lines[1:]}
        if not lines:
            shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir(exist_ok=True)
        # Written anew: a line that a kill has cut short must not be continued.
        self._journal: TextIO = (partial / _JOURNAL).open("w")
        self._write_lines([identity, *({"name": name, "record": record} for name, record in self.finished.items())])

    def forget(self, name: str) -> None:
        """Withdraw a claim that turned out wrong."""
        del self.finished[name]

    def record(self, name: str, record: Any) -> None:
        """Claim that a task is done; `record` (JSON) is what a later check compares with the bytes."""
        self.finished[name] = record
        with writing(self._partial):
            self._write_lines([{"name": name, "record": record}])

    def finish(self) -> None:
        """Give the output its final name; the old folder of that name goes only after that."""
        with writing(self._final):
            for folder, _, files in os.walk(self.path):
                for name in files:
                    _sync(Path(folder) / name)
                _sync(Path(folder))
            replaced = self._partial / _REPLACED
            if self._force and self._final.exists():
                self._final.rename(replaced)
            self.path.rename(self._final)
            _sync(self._final.parent)
            self.close()
            shutil.rmtree(self._partial)

    def discard(self) -> None:
        """Throw away what was made: there is nothing to go on from."""
        self.close()
        shutil.rmtree(self._partial)

    def close(self) -> None:
        """Let go of the journal."""
        self._journal.close()

    def _read_journal(self) -> list[dict[str, Any]]:
        lines = []
        if (self._partial / _JOURNAL).is_file():
            for line in (self._partial / _JOURNAL).read_text().splitlines():
                try:
                    lines.append(json.loads(line))
                except json.JSONDecodeError:
                    break  # the last line of a killed process; what it claims is done again
        return lines

    def _write_lines(self, lines: list[Any]) -> None:
        self._journal.writelines(json.dumps(line) + "\n" for line in lines)
        self._journal.flush()


def _partial(final: Path) -> Path:
    return final.with_name(final.name + ".partial")


def _put_back(partial: Path, final: Path) -> None:
    """Undo the first of two renames after a kill between them."""
    if (partial / _REPLACED).is_dir():
        if final.exists():
            shutil.rmtree(partial / _REPLACED)
        else:
            (partial / _REPLACED).rename(final)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else f"{text[:197]}..."


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
