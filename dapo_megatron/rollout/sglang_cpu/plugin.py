"""Entry point `sglang.srt.plugins`: hooks for calls of SGLang 0.5.23 that need a CUDA driver, or are slow for the sake of one.

Runs in its processes only.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


def register() -> None:
    """Called by SGLang in each of its processes; without effect on a machine with CUDA and outside CPU servers."""
    if os.environ.get("SGLANG_USE_CPU_ENGINE") != "1" or torch.cuda.is_available():
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for launch in ("_launch_scheduler_processes", "_launch_detokenizer_subprocesses"):
        HookRegistry.register(f"sglang.srt.entrypoints.engine.Engine.{launch}", _with_forks, HookType.AROUND)
    HookRegistry.register("torch.get_device_module", _get_device_module, HookType.AROUND)
    HookRegistry.register("sglang.srt.utils.weight_checker_comparator.RawComparable.iter_chunks", _iter_chunks, HookType.REPLACE)
    HookRegistry.register("sglang.srt.mem_cache.pool_host.common._cuda_host_register", _register_nothing, HookType.REPLACE)


def _with_forks(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Ranks and detokenizer are forked: this process has imported all that they need, and has no CUDA context to lose.

    A process of several threads may hold a lock that its child would wait for; there it stays with upstream's spawn.
    """
    if len(os.listdir("/proc/self/task")) > 1:
        return original(*args, **kwargs)
    method = multiprocessing.get_start_method()
    multiprocessing.set_start_method("fork", force=True)
    try:
        return original(*args, **kwargs)
    finally:
        multiprocessing.set_start_method(method, force=True)


def _get_device_module(original: Callable[..., Any], device: Any = None) -> Any:
    """A CUDA build of torch names torch.cuda as the default device, driver or not."""
    return torch.cpu if device is None else original(device)


def _iter_chunks(self: Any) -> Iterator[tuple[Tensor, None]]:
    """Pieces of the tensor where it is; upstream moves each to the GPU first."""
    from sglang.srt.utils.weight_checker_comparator import CHUNK_NUMEL

    flat = self.tensor.reshape(-1)
    for start in range(0, flat.numel(), CHUNK_NUMEL):
        yield flat[start : start + CHUNK_NUMEL], None


def _register_nothing(buffer: Any, registration_granularity_bytes: int | None = None) -> None:
    """Host memory needs no pinning without a GPU."""
