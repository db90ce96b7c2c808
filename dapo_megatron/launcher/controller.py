"""THE loop of a run: Algorithm 1 of the DAPO paper (arXiv 2503.14476) over handles.

The map of the system:

    PromptStream ──> Sampler ──> engines (generate) ──> reward workers (score) ──> groups with signal
                        ^                                                               │ build_train_batch
                        │ weights, version k + 1, fingerprints checked                  v
                     engines <── buckets in HF layout <── actor ranks (old log-probs, optimizer steps)

Rollout step k (from 0) samples with weight version k and leaves version k + 1. With `train.rollout_lag: 1` the engines sample for step k + 1,
with version k, while step k trains. Which engine, one machine or a cluster is decided by the handles passed in; the loop is the same.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

from pydantic import TypeAdapter

from dapo_megatron.algo.train_batch import TrainBatchRules, build_train_batch, shaped_rewards
from dapo_megatron.config.schema import Config
from dapo_megatron.data.loader import PromptStream, StreamState
from dapo_megatron.launcher.checkpoint_saver import STATE_FILE, CheckpointSaver
from dapo_megatron.launcher.identity import RunIdentity
from dapo_megatron.launcher.log_prob_alarm import LogProbAlarm
from dapo_megatron.launcher.recorded_batch import record
from dapo_megatron.launcher.rollouts import Rollouts
from dapo_megatron.launcher.run_folder import ACTOR, PhaseNote, RunFolder, actor_digests, read_marker, require_complete
from dapo_megatron.rollout.sampler import RolloutBatch, Sampler, SamplerState
from dapo_megatron.types import CheckpointError, EngineEndpoint, EngineError, TrainBatch
from dapo_megatron.weights.file_digest import FileDigest, digest_file
from dapo_megatron.weights.transports.records import PushReport

STOP_WINDOW = 10
"""Rollout steps over which train.stop_at_accuracy looks at the mean."""

logger = logging.getLogger(__name__)


class WeightSource(Protocol):
    """The part of the actor that sends weights."""

    def send_weights(self, version: int) -> AsyncIterator[Any]: ...


class WeightPush(Protocol):
    """The part of the actor that sends weights to servers."""

    async def push_weights(self, version: int, endpoints: Sequence[EngineEndpoint]) -> PushReport: ...


class ActorHandle(WeightSource, Protocol):
    """All actor ranks; a call runs on every one of them."""

    async def train(self, batch: TrainBatch, rollout_step: int) -> dict[str, float]: ...
    async def make_room(self) -> dict[str, float]: ...
    async def start_save(self, directory: Path) -> None: ...
    async def save_is_written(self) -> bool: ...
    async def finish_save(self) -> Mapping[str, FileDigest]: ...
    async def load(self, directory: Path, digests: Mapping[str, FileDigest], allow_canary: bool) -> None: ...


class EngineHandle(Protocol):
    """The part of an engine that takes weights; messages are what `ActorHandle.send_weights` yields."""

    weight_version: int

    async def receive(self, message: Any) -> int: ...


@runtime_checkable
class ServedEngines(Protocol):
    """All servers behind one handle."""

    async def update_weights(
        self, version: int, push: Callable[[Sequence[EngineEndpoint]], Awaitable[PushReport]]
    ) -> PushReport: ...

    async def release_memory(self) -> None: ...


class Reporter(Protocol):
    """Takes the row of each finished rollout step."""

    def __call__(self, row: Mapping[str, float]) -> None: ...


@dataclass(frozen=True, slots=True)
class ControllerState:
    """What a checkpoint holds besides the actor's files."""

    num_steps: int
    sampler: SamplerState
    prompts: StreamState
    recent_accuracy: tuple[float, ...]
    """Of the last rollout steps, for train.stop_at_accuracy."""
    identity: RunIdentity
    rollout: RolloutBatch | None = None
    """What the next step trains on, where it was sampled before (train.rollout_lag)."""


_STATE = TypeAdapter(ControllerState)


def read_state(checkpoint: Path) -> ControllerState:
    """The controller's part of a complete checkpoint; CheckpointError for any other path."""
    marker = read_marker(require_complete(checkpoint))
    if marker.weights_only:
        raise CheckpointError(f"{checkpoint} was kept for its weights alone; a run cannot go on from it, evaluate or convert it")
    file = checkpoint / STATE_FILE
    if digest_file(file) != marker.files.get(STATE_FILE):
        raise CheckpointError(f"{file} is not what was saved; the checkpoint is damaged, remove {checkpoint} to use an older one")
    return _STATE.validate_json(file.read_bytes())


class Controller:
    """Runs rollout steps from `num_steps_done` on. One controller drives one run."""

    def __init__(
        self,
        config: Config,
        *,
        actor: ActorHandle,
        engines: Sequence[EngineHandle],
        sampler: Sampler,
        prompts: PromptStream,
        folder: RunFolder,
        report: Reporter,
        identity: RunIdentity,
        evaluate: Callable[[], Awaitable[dict[str, float]]] | None = None,
        state: ControllerState | None = None,
    ):
        """`state` None starts a run, else it goes on where the state was saved; sampler and prompts have been restored already."""
        self._config, self._actor, self._engines = config, actor, engines
        self._sampler, self._prompts, self._folder, self._report = sampler, prompts, folder, report
        self._evaluate, self._identity = evaluate, identity
        self._num_steps_done = state.num_steps if state else 0
        self._started = time.time()
        self._rules = train_batch_rules(config)
        self._alarm = LogProbAlarm(config)
        self._saver = CheckpointSaver(actor, folder, config.checkpoint)
        self._clock = PhaseClock(config.cluster.phase_deadline_seconds, self._note_phase)
        self._recent_accuracy = deque(state.recent_accuracy if state else (), maxlen=STOP_WINDOW)
        self._rollouts = Rollouts(
            lambda: sampler.collect(config.train.num_prompts_per_step), settled=state.rollout if state else None
        )
        self._version_sent: int | None = None
        self._sync_metrics: dict[str, float] = {}

    async def run(self, start_from: Path | None = None) -> None:
        """Train to the end, from the HF weights or from a checkpoint."""
        if start_from is not None:
            await self._clock.run("load", self._load(start_from))
        await self._clock.run("sync", self._sync(self._num_steps_done))
        try:
            await self._steps(self._config.train.num_rollout_steps, self._config.train.rollout_lag == 1)
        finally:
            await self._rollouts.cancel()
        await self._saver.seal()  # only now: a sealed checkpoint says that the rows up to it are written

    async def _steps(self, last: int, samples_ahead: bool) -> None:
        for step in range(self._num_steps_done, last):
            self._clock.start_step()
            rollout = await self._clock.run("rollout", self._rollouts.take())
            batch = build_train_batch(rollout.groups, self._rules, seed=self._config.run.seed + step, weight_version=step)
            row = rollout_metrics(rollout, step, self._rules)
            if samples_ahead and step + 1 < last:  # the engines go on, with the weights that are about to be trained
                row |= await self._clock.run("sync", self._sync(step))
                self._rollouts.begin()
            if self._config.train.record_batch_of_step == step + 1:
                record(batch, self._folder.path, step + 1)
            await self._leave_devices_to_actor()
            if batch.optimizer_steps:  # no group with signal: nothing to learn, go on
                row |= await self._clock.run("train", self._actor.train(batch, step))
                self._alarm.check(row, step + 1)
            del rollout, batch  # else two steps' tokens are in memory while the next ones are generated
            done = step + 1 == last or self._accurate_enough(row)
            evaluates = self._evaluate is not None and _is_due(self._config.eval.interval, step + 1, done)
            if self._config.checkpoint.every:  # before the sync, which may move what is saved off the devices
                row |= await self._save(step + 1, done)
            if not samples_ahead or evaluates or done:
                await self._clock.run("rollout", self._rollouts.settle())
                row |= await self._clock.run("sync", self._sync(step + 1))
            if self._evaluate is not None and evaluates:
                row |= await self._clock.run("eval", self._evaluate())
            self._num_steps_done = step + 1
            self._report(self._finished_row(row))
            if done:
                break

    async def _leave_devices_to_actor(self) -> None:
        """Servers on its devices release their memory, whether it trains or only sends; the sync that follows gives it back."""
        takes_turns = self._config.cluster.placement == "colocated" and not self._config.train.rollout_lag
        if takes_turns and isinstance(self._engines[0], ServedEngines):
            await self._clock.run("sync", self._engines[0].release_memory())

    async def _sync(self, version: int) -> dict[str, float]:
        """Metrics of the sync that brought this version, which is now or, where the engines hold it already, was before."""
        if version != self._version_sent:
            moved = await self._actor.make_room() if self._config.actor.offload else {}
            self._sync_metrics = moved | await sync_weights(self._actor, self._engines, version)
            self._version_sent = version
        return self._sync_metrics

    async def _save(self, num_steps: int, done: bool) -> dict[str, float]:
        """Look after the save in flight, and begin one when it is time; the last one is waited for."""
        due = _is_due(self._config.checkpoint.every, num_steps, done)
        settled = await self._clock.run("rollout", self._rollouts.settle()) if due else None
        return await self._clock.run("save", self._collect_and_start(num_steps, due, done, settled))

    async def _collect_and_start(self, num_steps: int, due: bool, done: bool, settled: RolloutBatch | None) -> dict[str, float]:
        row = await self._saver.collect(wait=due)
        await self._saver.seal()
        if due:
            state = ControllerState(
                num_steps=num_steps,
                sampler=self._sampler.state(),
                prompts=self._prompts.state(),
                recent_accuracy=tuple(self._recent_accuracy),
                identity=self._identity,
                rollout=settled,
            )
            await self._saver.start(num_steps, _STATE.dump_json(state))
        return row | await self._saver.collect(wait=True) if done else row

    async def _load(self, checkpoint: Path) -> None:
        allow_canary = "canary" in self._config.checkpoint.allow_changed
        await self._actor.load((checkpoint / ACTOR).absolute(), actor_digests(checkpoint), allow_canary)

    def _note_phase(self, phase: str) -> None:
        self._folder.note_phase(PhaseNote(self._num_steps_done + 1, phase, time.time(), self._started))

    def _accurate_enough(self, row: Mapping[str, float]) -> bool:
        self._recent_accuracy.extend([row["rollout/accuracy"]] if "rollout/accuracy" in row else [])
        wanted = self._config.train.stop_at_accuracy
        full = len(self._recent_accuracy) == STOP_WINDOW
        return wanted is not None and full and sum(self._recent_accuracy) / STOP_WINDOW >= wanted

    def _finished_row(self, row: Mapping[str, float]) -> dict[str, float]:
        seconds, rollout = self._clock.seconds(), self._rollouts.times_of_taken
        tokens = row["rollout/num_tokens_generated"]
        return {
            "rollout_step": self._num_steps_done,
            **row,
            **{f"time/{phase}_seconds": value for phase, value in seconds.items()},
            "time/rollout_seconds": rollout.seconds,
            "time/rollout_wait_seconds": rollout.waited_seconds,
            "weights/version": self._version_sent or 0,
            "data/epoch": self._prompts.state().epoch,
            "throughput/tokens_per_second": tokens / seconds["step"],
            "throughput/rollout_tokens_per_second": tokens / rollout.seconds if rollout.seconds else 0.0,
            **(
                {"throughput/train_tokens_per_second": row["actor/num_loss_tokens"] / seconds["train"]}
                if "train" in seconds
                else {}
            ),
        }


async def sync_weights(
    actor: WeightSource | WeightPush, engines: Sequence[EngineHandle | ServedEngines], version: int
) -> dict[str, float]:
    """Bring the actor's weights to every engine as `version`. Returns the sync's metrics.

    Servers get them from the actor's ranks; embedded engines get them in messages that pass through here.
    """
    first = engines[0]
    if isinstance(first, ServedEngines):
        report = await first.update_weights(version, partial(cast(WeightPush, actor).push_weights, version))
        return report.metrics()
    num_bytes = 0
    async for message in cast(WeightSource, actor).send_weights(version):
        num_bytes += (await asyncio.gather(*(cast(EngineHandle, engine).receive(message) for engine in engines)))[0]
    for engine in engines:
        cast(EngineHandle, engine).weight_version = version
    return {"weights/sync_bytes": num_bytes}


def _is_due(every: int, num_steps_done: int, done: bool) -> bool:
    return done or (every > 0 and num_steps_done % every == 0)


class PhaseClock:
    """Runs the phases of a step under a deadline and keeps their wall-clock seconds."""

    def __init__(self, deadline_seconds: float, on_phase: Callable[[str], None] = lambda phase: None):
        """`on_phase` hears of each phase as it begins."""
        self._deadline_seconds, self._on_phase = deadline_seconds, on_phase
        self.start_step()

    def start_step(self) -> None:
        self._seconds: dict[str, float] = {}
        self._step_start = time.perf_counter()

    async def run[T](self, phase: str, work: Coroutine[Any, Any, T] | Awaitable[T]) -> T:
        """Await one phase. Raises EngineError, naming the phase, past the deadline."""
        start = time.perf_counter()
        self._on_phase(phase)
        try:
            async with asyncio.timeout(self._deadline_seconds):
                return await work
        except TimeoutError:
            raise EngineError(
                f"phase {phase} did not end within cluster.phase_deadline_seconds ({self._deadline_seconds:.0f}); "
                "look at the logs of ranks and engines, or raise the deadline"
            ) from None
        finally:
            self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - start

    def seconds(self) -> dict[str, float]:
        """Phase -> seconds of this step, and `step` for all of it."""
        return {**self._seconds, "step": time.perf_counter() - self._step_start}


def train_batch_rules(config: Config) -> TrainBatchRules:
    """The part of the config that decides how groups become optimizer steps."""
    return TrainBatchRules(
        num_updates=config.train.num_updates_per_rollout,
        data_parallel_size=config.actor.data_parallel_size,
        max_tokens_per_micro_batch=config.actor.max_tokens_per_micro_batch,
        num_micro_batches_multiple=config.actor.pipeline_parallel_size if config.actor.virtual_pipeline_size else 1,
        max_response_tokens=config.rollout.max_response_tokens,
        overlong_cache_tokens=config.algo.overlong_cache_tokens,
        overlong_filtering=config.algo.overlong_filtering,
        normalize_advantage_by_std=config.algo.normalize_advantage_by_std,
        advantage_std=config.algo.advantage_std,
        loss_aggregation=config.algo.loss_aggregation,
    )


def rollout_metrics(rollout: RolloutBatch, step: int, rules: TrainBatchRules) -> dict[str, float]:
    """The rollout's part of a metrics row; what was not measured has no key."""
    stats = rollout.stats
    rewards = [reward for group in rollout.groups for reward in shaped_rewards(group, rules)]
    row: dict[str, float | None] = {
        "rollout/accuracy": stats.accuracy,
        "rollout/reward": stats.reward,
        "rollout/shaped_reward": sum(rewards) / len(rewards) if rewards else None,
        "rollout/response_length_tokens": stats.response_length_tokens,
        "rollout/truncated_fraction": stats.truncated_fraction,
        "rollout/num_groups_generated": stats.num_groups_generated,
        "rollout/num_groups_kept": stats.num_groups_kept,
        "rollout/num_groups_all_correct": stats.num_groups_all_correct,
        "rollout/num_groups_all_wrong": stats.num_groups_all_wrong,
        "rollout/num_groups_out_of_band": stats.num_groups_out_of_band,
        "rollout/num_groups_surplus": stats.num_groups_surplus_kept,
        "rollout/num_groups_stale": stats.num_groups_stale,
        "rollout/num_groups_unfinished": stats.num_groups_unfinished,
        "rollout/num_tokens_generated": stats.num_tokens_generated,
        "rollout/num_tokens_used": stats.num_tokens_used,
        "rollout/num_tokens_zero_variance": stats.num_tokens_zero_variance,
        "rollout/num_tokens_out_of_band": stats.num_tokens_out_of_band,
        "rollout/num_tokens_surplus": stats.num_tokens_surplus_kept,
        "rollout/num_tokens_stale": stats.num_tokens_stale,
        "rollout/num_tokens_aborted": stats.num_tokens_aborted,
        "rollout/num_tokens_unfinished": stats.num_tokens_unfinished,
        "rollout/num_reward_errors": stats.num_samples_scored_by_default,
        "rollout/staleness_max": max((step - group.oldest_weight_version for group in rollout.groups), default=None),
    }
    return {name: value for name, value in row.items() if value is not None}
