"""The processes of a run as the loop sees them: all actor ranks as one actor, embedded engines, the holders of SGLang servers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from dapo_megatron.actor.probed import Probed
from dapo_megatron.actor.replayed import Replay
from dapo_megatron.launcher.held_weights import HeldWeights
from dapo_megatron.launcher.ray.calls import Process, call, call_all, call_each, exhaust, first_failure, in_words
from dapo_megatron.rollout.engine import GenerateRequest, GenerateResult, HoldsNothing
from dapo_megatron.types import EngineEndpoint, EngineError, TrainBatch, WorkerDiedError
from dapo_megatron.weights.file_digest import FileDigest
from dapo_megatron.weights.transports.records import PushReport

BUCKETS_IN_FLIGHT = 2
"""Weight buckets that may exist at the same time."""


class RayActor:
    """All actor ranks as one handle; every call runs on all of them."""

    def __init__(self, processes: Sequence[Process], data_parallel_ranks: Sequence[int], offloads: bool = False):
        """`data_parallel_ranks[i]` is the one of `processes[i]`; `offloads` is actor.offload."""
        self._offloads = offloads
        self.processes, self._data_parallel_ranks = tuple(processes), tuple(data_parallel_ranks)
        self.held = HeldWeights(self.push_weights)

    async def train(self, batch: TrainBatch, rollout_step: int) -> dict[str, float]:
        """Metrics of the actor."""
        self._take_devices()
        with self.held.while_training(rollout_step):
            return (await self._on_shares("train", batch, rollout_step))[0]

    async def replay(self, batch: TrainBatch, rollout_step: int) -> Replay:
        """Train on the batch and bring back what no layout may change."""
        return (await self._on_shares("replay", batch, rollout_step))[0]

    async def probe(self, batch: TrainBatch, rollout_step: int) -> list[Probed]:
        """Time the optimizer steps of the batch but the first, which warms up; what each rank measured."""
        return await self._on_shares("probe", batch, rollout_step)

    async def send_weights(self, version: int) -> AsyncIterator[Any]:
        """References to weight messages in the object store, rank 0's; the other ranks feed it."""
        options = {"num_returns": "streaming", "_generator_backpressure_num_objects": BUCKETS_IN_FLIGHT}
        first, *others = self.processes
        stream = first.handle.send_weights.options(**options).remote(version)
        feeding = [
            asyncio.ensure_future(exhaust(process, process.handle.send_weights.options(num_returns="streaming").remote(version)))
            for process in others
        ]
        try:
            async for reference in stream:
                yield reference
            await first_failure([asyncio.ensure_future(call(first, stream.completed())), *feeding])
        except RayError as error:
            raise in_words(first, error) from error
        finally:
            for task in feeding:
                task.cancel()

    async def push_weights(self, version: int, endpoints: Sequence[EngineEndpoint]) -> PushReport:
        """Bring the present weights to rollout servers; servers that failed are in the report."""
        self.held.are(version)
        report: PushReport = (await self._on_all("push_weights", version, endpoints))[0]
        return report

    async def make_room(self) -> dict[str, float]:
        """Leave the devices to the engines, see `ActorWorker.make_room`; rank 0's metrics."""
        metrics: dict[str, float] = (await self._on_all("make_room"))[0]
        self.held.let_go()
        return metrics

    async def start_save(self, directory: Path) -> None:
        """Begin to write a checkpoint in the background."""
        self._take_devices()
        await self._on_all("start_save", directory)

    async def save_is_written(self) -> bool:
        """Whether all ranks are done with their files."""
        return all(await self._on_all("save_is_written"))

    async def finish_save(self) -> dict[str, FileDigest]:
        """Complete the checkpoint; digests of the files that ranks wrote."""
        return {name: digest for digests in await self._on_all("finish_save") for name, digest in digests.items()}

    async def load(self, directory: Path, digests: Mapping[str, FileDigest], allow_canary: bool) -> None:
        """Read a checkpoint and prove that it is the one saved."""
        self._take_devices()
        await self._on_all("load", directory, digests, allow_canary)

    async def load_weights(self, directory: Path, digests: Mapping[str, FileDigest]) -> None:
        """Read a checkpoint's weights alone."""
        await self._on_all("load_weights", directory, digests)

    def stop(self) -> None:
        """End the processes and free what they hold: an evaluation needs them no more once the engines have the weights."""
        for process in self.processes:
            ray.kill(process.handle)
        self.processes = ()
        self.held.are_gone()

    def _take_devices(self) -> None:
        """What comes next has the ranks take back what they have given up; an engine that returns waits until `make_room`."""
        if self._offloads:
            self.held.keep_back()

    async def _on_shares(self, method: str, batch: TrainBatch, rollout_step: int) -> list[Any]:
        """Each rank is sent the share of its data-parallel rank, which is put into the object store once."""
        shares = {dp_rank: ray.put(batch.share(dp_rank)) for dp_rank in sorted(set(self._data_parallel_ranks))}
        args = [(shares[dp_rank], rollout_step) for dp_rank in self._data_parallel_ranks]
        return await call_each(self.processes, method, args)

    async def _on_all(self, method: str, *args: Any) -> list[Any]:
        return await call_all(self.processes, method, *args)


class RayEngine(HoldsNothing):
    """What the sampler and the controller ask of an engine, over a process; weight messages are object-store references."""

    def __init__(self, process: Process):
        self.process = process
        self.weight_version = 0

    async def generate(self, requests: Sequence[GenerateRequest]) -> AsyncGenerator[GenerateResult, None]:
        """As the engine's own."""
        try:
            async for reference in self.process.handle.generate.options(num_returns="streaming").remote(requests):
                for result in await reference:
                    yield result
        except RayError as error:
            raise in_words(self.process, error) from error

    async def abort(self, request_ids: Collection[int]) -> None:
        """As the engine's own."""
        await call(self.process, self.process.handle.abort.remote(request_ids))

    async def receive(self, message: Any) -> int:
        """Take the next bucket or the manifest; the bytes of weights in it."""
        return await call(self.process, self.process.handle.receive.remote(message))

    async def close(self) -> None:
        """Nothing is open."""


class RayServers:
    """The processes that hold the SGLang servers of a run: where they stand, and how each is started again."""

    def __init__(self, launch: Callable[[int], Process], num_engines: int):
        """`launch` starts the process of an engine, by index."""
        self._launch = launch
        self.processes = [launch(index) for index in range(num_engines)]
        self._gpu_ids: list[tuple[int, ...] | None] = [None] * num_engines

    async def start(self, gpu_ids: Sequence[tuple[int, ...] | None]) -> list[EngineEndpoint]:
        """All at once. The first error of one is raised."""
        self._gpu_ids = list(gpu_ids)
        return await call_each(self.processes, "start_here", [(ids,) for ids in gpu_ids])

    async def restart(self, name: str) -> EngineEndpoint:
        """Start a server again, in a new process where its own is gone. EngineError when it does not come up."""
        index = next(i for i, process in enumerate(self.processes) if process.name == name)
        try:
            return await self._start_one(index)
        except WorkerDiedError:
            self.processes[index] = self._launch(index)
        try:
            return await self._start_one(index)
        except WorkerDiedError as error:
            raise EngineError(f"{name} cannot be started again: {error}") from error

    async def _start_one(self, index: int) -> EngineEndpoint:
        return (await call_all([self.processes[index]], "start_here", self._gpu_ids[index]))[0]
