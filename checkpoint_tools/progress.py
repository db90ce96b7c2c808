"""A progress bar in bytes, on stderr, so that stdout stays for results."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from checkpoint_tools.worker_pool import Report


@contextmanager
def progress_bar(what: str, num_bytes: int, done: int = 0) -> Iterator[Report]:
    """Yields the function to report bytes with. Nothing is drawn where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task(what, total=num_bytes, completed=done)
        yield lambda count: progress.advance(bar, count)
