"""Runs a function on N real gloo ranks, each a process of its own.

The ranks are forked from a server process that has imported torch and megatron-core already, which makes a world start in
well under a second.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.distributed.preload"])


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout_seconds: float = 90) -> list[Any]:
    """`function(rank, init_method, *args)` on every rank; their results in rank order.

    Raises AssertionError with the first failing rank's traceback, or when a rank is not done in time. No process is left behind.
    """
    with tempfile.TemporaryDirectory() as folder:
        init_method = f"file://{Path(folder) / 'rendezvous'}"
        pipes, processes = [], []
        for rank in range(world_size):
            receiver, sender = CONTEXT.Pipe(duplex=False)
            process = CONTEXT.Process(target=_rank_main, args=(sender, function, rank, init_method, args), daemon=False)
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
        try:
            return _collect(pipes, timeout_seconds)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _collect(pipes: list[Any], timeout_seconds: float) -> list[Any]:
    results: dict[int, Any] = {}
    waiting = dict(enumerate(pipes))
    while waiting:
        ready = wait(list(waiting.values()), timeout=timeout_seconds)
        assert ready, f"ranks {sorted(waiting)} gave no result within {timeout_seconds} s"
        for rank in [rank for rank, pipe in waiting.items() if pipe in ready]:
            try:
                failed, value = waiting.pop(rank).recv()
            except EOFError:
                raise AssertionError(f"rank {rank} died without a word") from None
            assert not failed, f"rank {rank}:\n{value}"
            results[rank] = value
    return [results[rank] for rank in sorted(results)]


def _rank_main(sender: Any, function: Callable[..., Any], rank: int, init_method: str, args: tuple) -> None:
    try:
        sender.send((False, function(rank, init_method, *args)))
    except BaseException:  # noqa: BLE001 - reported to the test, which fails with it
        sender.send((True, traceback.format_exc()))
    finally:
        for child in multiprocessing.active_children():  # megatron-core starts a manager process when it saves
            child.kill()
        os._exit(0)  # gloo's threads must not wait for ranks that are gone
