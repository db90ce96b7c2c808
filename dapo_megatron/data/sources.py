"""Rows of a data source: JSON lines, parquet, or a data set on a hub. Streams; nothing is held but the current batch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dapo_megatron.config.schema import DataConfig
from dapo_megatron.types import DataError

_JSON_SUFFIXES = (".jsonl", ".json")
_PARQUET_SUFFIX = ".parquet"
_PARQUET_BATCH_ROWS = 1024


@dataclass(frozen=True, slots=True)
class Row:
    """One row as read. `index` counts rows from 0; `place` is where a person finds it; `fault` why it could not be read."""

    index: int
    place: str
    columns: Mapping[str, Any]
    fault: str | None = None


def read_rows(config: DataConfig) -> Iterator[Row]:
    """The rows of `data.path` in their order. Raises DataError when there is no such source."""
    path = Path(config.path).expanduser()
    if path.is_file():
        if path.suffix in _JSON_SUFFIXES:
            return _read_json_lines(path)
        if path.suffix == _PARQUET_SUFFIX:
            return _read_parquet(path)
        raise DataError(f"data.path ({config.path}) must end in .jsonl, .json or .parquet; convert the file to one of them.")
    if _looks_like_file(config.path):
        raise DataError(
            f"data.path ({config.path}) does not exist as a file (working directory {Path.cwd()}); "
            "correct the path, or give the name of a data set on a hub, such as openai/gsm8k."
        )
    return _read_hub(config)


def _looks_like_file(path: str) -> bool:
    return path.startswith(("/", "./", "../", "~")) or path.count("/") > 1 or path.endswith((*_JSON_SUFFIXES, _PARQUET_SUFFIX))


def _read_json_lines(path: Path) -> Iterator[Row]:
    """Blank lines are no rows; a line that is not a JSON object is a row with a fault."""
    index = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            columns, fault = _parse_object(line)
            yield Row(index, f"{path}:{number}", columns, fault)
            index += 1


def _parse_object(line: bytes) -> tuple[Mapping[str, Any], str | None]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:  # ValueError: bad JSON or bad UTF-8
        return {}, f"not JSON ({error})"
    if not isinstance(value, dict):
        return {}, f"a JSON {type(value).__name__}, not an object; write one object a line"
    return value, None


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            batches = (batch.to_pylist() for batch in file.iter_batches(batch_size=_PARQUET_BATCH_ROWS))
            yield from _number_rows((columns for batch in batches for columns in batch), str(path))
    except pyarrow.ArrowException as error:
        raise DataError(f"data.path ({path}) is not readable as parquet ({error}); download or write the file again.") from error


def _read_hub(config: DataConfig) -> Iterator[Row]:
    import datasets

    try:
        data_set = datasets.load_dataset(config.path, split=config.split)
    except (OSError, ValueError) as error:  # unknown name or split, no network, broken download
        raise DataError(
            f"data.path ({config.path}) is no file, and split {config.split} of a hub data set of that name could not be loaded "
            f"({error}); correct data.path and data.split, or download the data set and give its file."
        ) from error
    return _number_rows(data_set, f"{config.path}[{config.split}]")


def _number_rows(rows: Iterable[Mapping[str, Any]], source: str) -> Iterator[Row]:
    for index, columns in enumerate(rows):
        yield Row(index, f"{source} row {index}", columns)
