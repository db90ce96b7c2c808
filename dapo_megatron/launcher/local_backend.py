"""One actor rank and one embedded engine in this very process: a small model, a debugger, nothing to start.

They take turns in one thread, so that torch has one pool of threads and the controller's event loop stays free. There are no log
files; what goes wrong is raised where it is awaited.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dapo_megatron.config.schema import Config, HfEngineConfig
from dapo_megatron.launcher.backends import Ranks
from dapo_megatron.launcher.rank import build_rank
from dapo_megatron.launcher.stall import ProcessPlace
from dapo_megatron.rollout.engine import GenerateRequest, GenerateResult, HoldsNothing
from dapo_megatron.types import TrainBatch
from dapo_megatron.weights.file_digest import FileDigest
from dapo_megatron.weights.sync import WeightBucket, WeightManifest

if TYPE_CHECKING:
    from dapo_megatron.rollout.hf_engine import HfEngine


class LocalActor:
    """The only rank; every call runs in `thread`, one after the other."""

    def __init__(self, config: Config, ranks: Ranks, thread: ThreadPoolExecutor):
        self._thread = thread
        self._worker: Any = None if ranks == "none" else self._thread.submit(_build_worker, config, ranks).result()

    async def train(self, batch: TrainBatch, rollout_step: int) -> dict[str, float]:
        """Metrics of the actor."""
        return await self._in_thread(self._worker.train, batch.share(0), rollout_step)

    async def send_weights(self, version: int) -> AsyncIterator[WeightBucket | WeightManifest]:
        """The buckets, then the manifest."""
        messages = self._worker.send_weights(version)
        while (message := await self._in_thread(next, messages, None)) is not None:
            yield message

    async def make_room(self) -> dict[str, float]:
        """Leave the device to the engine, see `ActorWorker.make_room`."""
        return await self._in_thread(self._worker.make_room)

    async def start_save(self, directory: Path) -> None:
        """Begin to write a checkpoint in the background."""
        await self._in_thread(self._worker.start_save, directory)

    async def save_is_written(self) -> bool:
        """Whether the rank is done with its files."""
        return self._worker.save_is_written()

    async def finish_save(self) -> dict[str, FileDigest]:
        """Complete the checkpoint; digests of its files."""
        return await self._in_thread(self._worker.finish_save)

    async def load(self, directory: Path, digests: Mapping[str, FileDigest], allow_canary: bool) -> None:
        """Read a checkpoint and prove that it is the one saved."""
        await self._in_thread(self._worker.load, directory, digests, allow_canary)

    async def load_weights(self, directory: Path, digests: Mapping[str, FileDigest]) -> None:
        """Read a checkpoint's weights alone."""
        await self._in_thread(self._worker.load_weights, directory, digests)

    def stop(self) -> None:
        """Leave the world and free what the rank holds; stopping twice is harmless."""
        if self._worker is not None:
            self._thread.submit(self._worker.close).result()
            self._worker = None

    async def _in_thread[*Args, T](self, function: Callable[[*Args], T], *args: *Args) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)


def _build_worker(config: Config, ranks: Ranks) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return build_rank(config, rank=0, init_method=f"file://{folder}/rendezvous", frozen=ranks == "frozen")


class LocalEngine(HoldsNothing):
    """The embedded engine with the controller's names for its calls."""

    def __init__(self, engine: HfEngine):
        self._engine = engine
        self.weight_version = 0

    def generate(self, requests: Sequence[GenerateRequest]) -> AsyncGenerator[GenerateResult, None]:
        """As the engine's own."""
        return self._engine.generate(requests)

    async def abort(self, request_ids: Collection[int]) -> None:
        """As the engine's own."""
        await self._engine.abort(request_ids)

    async def receive(self, message: WeightBucket | WeightManifest) -> int:
        """Take the next bucket or the manifest; the bytes of weights in it."""
        return await self._engine.receive(message)

    async def close(self) -> None:
        """Nothing is open."""


@dataclass(frozen=True, slots=True)
class LocalBackend:
    """The rank and the engine of this process."""

    actor: LocalActor
    engines: tuple[LocalEngine, ...]
    places: tuple[ProcessPlace, ...] = ()
    """None but this process."""
    dump_elsewhere: None = None


@contextmanager
def local_backend(config: Config, ranks: Ranks) -> Iterator[LocalBackend]:
    """Build the engine and the rank; on leaving, stop the rank."""
    import torch

    from dapo_megatron.rollout.hf_engine import HfEngine

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with ThreadPoolExecutor(1, "rank-and-engine", partial(torch.set_num_threads, config.actor.num_threads)) as thread:
        settings = config.rollout.engine
        assert isinstance(settings, HfEngineConfig)  # checks.py refuses the others
        engine = HfEngine(config.model.path, settings, device=device, worker=thread)
        actor = LocalActor(config, ranks, thread)
        try:
            yield LocalBackend(actor, (LocalEngine(engine),))
        finally:
            actor.stop()
