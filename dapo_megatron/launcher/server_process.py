"""The process that holds one SGLang server on its node: starts it, starts it again, ends it with itself."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from dapo_megatron.config.schema import Config, SglangEngineConfig
from dapo_megatron.rollout.sglang_server import ServerSpec, SglangServer
from dapo_megatron.types import EngineEndpoint


class ServerProcess:
    """One server of the run; `index` counts them from 0."""

    def __init__(self, config: Config, index: int, log_file: Path):
        """The output of the server, of all its lives, goes to `log_file`."""
        self._config, self._index, self._log_file = config, index, log_file
        self._server: SglangServer | None = None

    def start(self, host: str, device: Literal["cpu", "cuda"], gpu_ids: tuple[int, ...] | None) -> EngineEndpoint:
        """Start a server, in place of an earlier one, and wait until it generates. EngineError with the end of its log otherwise.

        `gpu_ids` None: the GPUs that this process sees.
        """
        if self._server is not None:
            self._server.stop()
        config, engine = self._config, self._config.rollout.engine
        assert isinstance(engine, SglangEngineConfig)
        ranks = config.rollout.num_engines * engine.tensor_parallel_size
        self._server = SglangServer(
            ServerSpec(
                name=f"engine {self._index}",
                model_dir=config.model.path,
                config=engine,
                extra=config.rollout.sglang_extra,
                device=device,
                num_threads=engine.num_threads or max(1, (os.cpu_count() or 1) // ranks),
                gpu_ids=gpu_ids,
                host=host,
                share_of_ports=(self._index, config.rollout.num_engines),
                random_seed=config.run.seed * 1009 + self._index,
                memory_saver=config.cluster.placement == "colocated",
            ),
            self._log_file,
        )
        return self._server.start(config.cluster.startup_deadline_seconds)

    def stop(self) -> None:
        """End the server; this process stays."""
        if self._server is not None:
            self._server.stop()
