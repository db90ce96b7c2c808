"""Checkpoints of a running run: started, written while training goes on, sealed, pruned.

One save is in flight at most. A save that fails (a full disk, no permission) costs its own checkpoint: the run and the older
checkpoints stay, the log says so, and `checkpoint/num_failed_saves` counts it.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

from dapo_megatron.config.schema import CheckpointConfig
from dapo_megatron.launcher.run_folder import ACTOR, RunFolder
from dapo_megatron.types import CheckpointError
from dapo_megatron.weights.file_digest import FileDigest

STATE_FILE = "controller.json"
POLL_SECONDS = 0.02

logger = logging.getLogger(__name__)


class SavingActor(Protocol):
    """The part of the actor that saves; every call runs on all ranks."""

    async def start_save(self, directory: Path) -> None: ...
    async def save_is_written(self) -> bool: ...
    async def finish_save(self) -> Mapping[str, FileDigest]: ...


@dataclass(frozen=True, slots=True)
class _Save:
    directory: Path
    started: float


@dataclass(frozen=True, slots=True)
class _Written:
    directory: Path
    digests: Mapping[str, FileDigest]


class CheckpointSaver:
    """`start`, then `collect` until the files are written, then `seal`; each is safe to call when there is nothing to do."""

    def __init__(self, actor: SavingActor, folder: RunFolder, config: CheckpointConfig):
        self._actor, self._folder, self._config = actor, folder, config
        self._save: _Save | None = None
        self._written: _Written | None = None
        self._num_failed = 0

    async def start(self, num_steps: int, state: bytes) -> None:
        """Copy what belongs to the checkpoint and begin to write it; `state` is the controller's part."""
        assert self._save is None and self._written is None, "the save before was not collected and sealed"
        started = time.perf_counter()
        try:
            directory = self._folder.begin_checkpoint(num_steps).absolute()
            self._save = _Save(directory, started)
            (directory / ACTOR).mkdir()
            (directory / STATE_FILE).write_bytes(state)
            await self._actor.start_save(directory / ACTOR)
        except (OSError, CheckpointError) as error:
            self._failed(self._folder.unfinished_checkpoint(num_steps), error)

    async def collect(self, *, wait: bool) -> dict[str, float]:
        """Metrics of the save, once: when its files are written, or now with `wait`. Empty while there is nothing to say."""
        if self._save is None:
            return {}
        while not await self._actor.save_is_written():
            if not wait:
                return {}
            await asyncio.sleep(POLL_SECONDS)
        save = self._save
        try:
            digests = await self._actor.finish_save()
        except CheckpointError as error:
            self._failed(save.directory, error)
            return {"checkpoint/num_failed_saves": self._num_failed}
        self._save = None
        self._written = _Written(save.directory, {f"{ACTOR}/{name}": digest for name, digest in digests.items()})
        return {
            "checkpoint/bytes": sum(file.stat().st_size for file in save.directory.rglob("*") if file.is_file()),
            "checkpoint/write_seconds": time.perf_counter() - save.started,
            "checkpoint/num_failed_saves": self._num_failed,
        }

    async def seal(self, amended: Mapping[int, bytes] = MappingProxyType({})) -> None:
        """Make the collected checkpoint a complete one, and remove what is older than wanted.

        `amended`: by number of steps, what the controller's part has become since `start`.
        """
        if self._written is None:
            return
        written, self._written = self._written, None
        try:
            for num_steps, state in amended.items():
                if written.directory == self._folder.unfinished_checkpoint(num_steps).absolute():
                    (written.directory / STATE_FILE).write_bytes(state)
            await asyncio.to_thread(self._folder.complete_checkpoint, written.directory, written.digests)
        except OSError as error:
            self._failed(written.directory, error)
            return
        try:
            await asyncio.to_thread(self._folder.prune, self._config.keep_last, self._config.keep_every)
        except OSError as error:
            logger.error(
                f"older checkpoints than checkpoint.keep_last ({self._config.keep_last}) wants could not be removed: {error}. "
                f"{written.directory.name} is saved; mend permissions under {self._folder.checkpoints}, it is tried again after the next save."
            )

    def _failed(self, directory: Path, error: OSError | CheckpointError) -> None:
        self._num_failed += 1
        newest = self._folder.newest_checkpoint()
        logger.error(
            f"CHECKPOINT NOT SAVED: {directory.name}: {error}. The run goes on; a crash now would go back to "
            f"{newest.name if newest else 'the beginning'}. Free space or mend permissions under {self._folder.checkpoints} "
            f"({shutil.disk_usage(self._folder.path).free / 2**30:.1f} GiB are free there)."
        )
        shutil.rmtree(directory, ignore_errors=True)
        self._save = None
