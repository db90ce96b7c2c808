"""An actor rank in the process that calls: what happens before megatron-core is imported, and which worker it is."""

from __future__ import annotations

import os
from typing import Any

from dapo_megatron.config.schema import Config
from dapo_megatron.launcher.imports import without_collection


def build_rank(config: Config, *, rank: int, init_method: str, frozen: bool) -> Any:
    """An `ActorWorker` or, with `frozen`, a `FrozenActor`, once all ranks have met at `init_method`."""
    from dapo_megatron.actor import cpu_adapter

    cpu_adapter.install()
    if init_method.startswith("file:"):  # all ranks on this machine: nothing leaves the loopback interface
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with without_collection():
        from dapo_megatron.actor.frozen import FrozenActor
        from dapo_megatron.actor.worker import ActorWorker

    worker: Any = FrozenActor if frozen else ActorWorker
    return worker(config, rank=rank, init_method=init_method)
