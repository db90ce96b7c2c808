"""THE loop of a run: Algorithm 1 of the DAPO paper (arXiv 2503.14476) over handles.

The map of the system:

    PromptStream ──> Sampler ──> engines (generate) ──> reward workers (score) ──> groups with signal
                        ^                                                               │ build_train_batch
                        │ weights, version k + 1, fingerprints checked                  v
                     engines <── buckets in HF layout <── actor ranks (old log-probs, optimizer steps)

Rollout step k (from 0) samples with weight version k and leaves version k + 1. With `train.rollout_lag: 1` the engines sample for step k + 1,
with version k, while step k trains. Which engine, one machine or a cluster is decided by the handles passed in; the loop is the same.

A run that is told to stop leaves a checkpoint from which it goes on as if nothing had been: a rollout or an evaluation under way is dropped
(it comes again, the same, after the restart), everything else is finished first. With `rollout_lag: 1` the rollout is finished too, because
the weights that it samples with are in no checkpoint.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
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
from dapo_megatron.launcher.phase_clock import Deadlines, Diagnose, PhaseClock
from dapo_megatron.launcher.phase_history import PhaseHistory, settings_of
from dapo_megatron.launcher.recorded_batch import record
from dapo_megatron.launcher.rollouts import Rollouts
from dapo_megatron.launcher.run_folder import (
    ACTOR,
    PhaseNote,
    RunFolder,
    actor_digests,
    num_steps_of,
    read_marker,
    require_complete,
)
from dapo_megatron.launcher.stop import StopRequest
from dapo_megatron.rollout.sampler import RolloutBatch, Sampler, SamplerState
from dapo_megatron.types import CheckpointError, EngineEndpoint, StopNotSavedError, TrainBatch
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
    unreported: dict[str, float] | None = None
    """The row of the last step, where its evaluation was dropped: it is measured, and the row written, first thing after a restart."""


_STATE = TypeAdapter(ControllerState)


class _ToldToStop(Exception):
    """Leaves the steps; the checkpoint is still to be written."""


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
        stop: StopRequest | None = None,
        diagnose: Diagnose = lambda words: "",
    ):
        """`state` None starts a run, else it goes on where the state was saved; sampler and prompts have been restored already.

        `diagnose` is asked where a phase that stalls stands.
        """
        self._config, self._actor, self._engines = config, actor, engines
        self._sampler, self._prompts, self._folder, self._report = sampler, prompts, folder, report
        self._evaluate, self._identity = evaluate, identity
        self._num_steps_done = self._num_steps_at_start = state.num_steps if state else 0
        self._unreported = state.unreported if state else None
        self._stop = stop or StopRequest()
        self._before_dropped: tuple[SamplerState, StreamState] | None = None
        self._started = time.time()
        self._rules = train_batch_rules(config)
        self._alarm = LogProbAlarm(config)
        self._saver = CheckpointSaver(actor, folder, config.checkpoint)
        history = PhaseHistory(folder.phase_times_file, settings_of(config))
        self._clock = PhaseClock(Deadlines(config.cluster, history), self._note_phase, diagnose)
        self._recent_accuracy = deque(state.recent_accuracy if state else (), maxlen=STOP_WINDOW)
        self._rollouts = Rollouts(self._collect, settled=state.rollout if state else None)
        self._version_sent: int | None = None
        self._sync_metrics: dict[str, float] = {}

    async def run(self, start_from: Path | None = None) -> bool:
        """Train to the end, from the HF weights or from a checkpoint. False: told to stop before, and all that was done is saved."""
        with self._clock.last_resort(), self._stop.listening() as self._stopped:
            try:
                if start_from is not None:
                    await self._clock.run("load", self._load(start_from))
                await self._clock.run("sync", self._sync(self._num_steps_done))
                await self._steps(self._config.train.num_rollout_steps, self._config.train.rollout_lag == 1)
                ended = True
            except _ToldToStop:
                await self._save_for_restart()
                ended = False
            finally:
                await self._rollouts.cancel()
            await self._saver.seal()  # only now: a sealed checkpoint says that the rows up to it are written
        if not ended:
            self._require_saved()
        return ended

    async def _steps(self, last: int, samples_ahead: bool) -> None:
        if self._unreported is not None and await self._report_after_restart(self._unreported, last):
            return
        for step in range(self._num_steps_done, last):
            self._stop_here()
            self._clock.start_step()
            rollout = await self._clock.run("rollout", self._next_rollout())
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
            self._recent_accuracy.extend([row["rollout/accuracy"]] if "rollout/accuracy" in row else [])
            done = step + 1 == last or self._is_accurate_enough()
            evaluates = self._evaluate is not None and _is_due(self._config.eval.interval, step + 1, done)
            if self._config.checkpoint.every:  # before the sync, which may move what is saved off the devices
                row |= await self._save(step + 1, done)
            if not samples_ahead or evaluates or done:
                await self._clock.run("rollout", self._rollouts.settle())
                row |= await self._clock.run("sync", self._sync(step + 1))
            self._num_steps_done = step + 1
            if evaluates:
                row |= await self._measure(row)
            self._report(self._finished_row(row))
            if done:
                break

    async def _next_rollout(self) -> RolloutBatch:
        if not self._rollouts.is_begun:
            return await self._unless_stopped(self._rollouts.take())
        await self._rollouts.settle()  # sampled with weights that the actor has no more: it cannot be had again
        self._stop_here()
        return await self._rollouts.take()

    async def _collect(self) -> RolloutBatch:
        self._before_dropped = (self._sampler.state(), self._prompts.state())
        rollout = await self._sampler.collect(self._config.train.num_prompts_per_step)
        self._before_dropped = None
        return rollout

    async def _measure(self, row: dict[str, float]) -> dict[str, float]:
        """Metrics of the evaluation; where it is dropped, what else the step has to report goes into the checkpoint."""
        assert self._evaluate is not None
        try:
            return await self._clock.run("eval", self._unless_stopped(self._evaluate()))
        except _ToldToStop:
            self._unreported = self._finished_row(row)
            raise

    async def _report_after_restart(self, row: dict[str, float], last: int) -> bool:
        """Measure what was dropped before the restart, and report its step. True: that step was the last one."""
        self._stop_here()
        self._clock.start_step()
        if self._evaluate is not None:
            row = row | await self._clock.run("eval", self._unless_stopped(self._evaluate()))
            row |= {"time/eval_seconds": self._clock.seconds()["eval"]}
        self._report({**row, "rollout_step": self._num_steps_done})
        self._unreported = None
        return self._num_steps_done == last or self._is_accurate_enough()

    def _stop_here(self) -> None:
        if self._stop.reason is not None:
            raise _ToldToStop

    async def _unless_stopped[T](self, work: Awaitable[T]) -> T:
        """What may be dropped: it comes again, the same, after a restart."""
        task, stopped = asyncio.ensure_future(work), asyncio.ensure_future(self._stopped.wait())
        try:
            await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise _ToldToStop
        finally:
            stopped.cancel()
            if not task.done():
                task.cancel()
                await asyncio.wait({task})

    async def _save_for_restart(self) -> None:
        """A checkpoint of all that was done, if the newest one is not that already."""
        settled = await self._clock.run("rollout", self._rollouts.settle())
        await self._in_save_phase(self._saver.collect(wait=True))
        await self._saver.seal(self._amended(settled))
        if self._is_unsaved():
            await self._leave_devices_to_actor()
            await self._in_save_phase(self._collect_and_start(self._num_steps_done, True, True, settled))

    def _amended(self, settled: RolloutBatch | None) -> dict[int, bytes]:
        """For a save that was begun before its step's evaluation, which then was dropped."""
        return {self._num_steps_done: self._state(self._num_steps_done, settled)} if self._unreported is not None else {}

    def _is_unsaved(self) -> bool:
        newest = self._folder.newest_checkpoint()
        saved = num_steps_of(newest) if newest is not None else None
        return self._num_steps_done not in (self._num_steps_at_start, saved)

    def _require_saved(self) -> None:
        if self._is_unsaved():
            newest = self._folder.newest_checkpoint()
            raise StopNotSavedError(
                f"told to stop ({self._stop.reason}) after rollout step {self._num_steps_done}, which could not be saved; starting again goes "
                f"back to {newest.name if newest else 'the beginning'}. Free space or mend permissions under {self._folder.checkpoints}"
            )

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
        return await self._in_save_phase(self._collect_and_start(num_steps, due, done, settled))

    async def _in_save_phase(self, work: Awaitable[dict[str, float]]) -> dict[str, float]:
        """Its deadline is learnt from whole checkpoints: most of these phases only look whether one is written."""
        row = await self._clock.run("save", work, learns=False)
        if "checkpoint/write_seconds" in row:
            self._clock.learn("save", row["checkpoint/write_seconds"])
        return row

    async def _collect_and_start(self, num_steps: int, due: bool, done: bool, settled: RolloutBatch | None) -> dict[str, float]:
        row = await self._saver.collect(wait=due)
        await self._saver.seal()
        if due:
            await self._saver.start(num_steps, self._state(num_steps, settled))
        return row | await self._saver.collect(wait=True) if done else row

    def _state(self, num_steps: int, settled: RolloutBatch | None) -> bytes:
        sampler, prompts = self._before_dropped or (self._sampler.state(), self._prompts.state())
        state = ControllerState(
            num_steps=num_steps,
            sampler=sampler,
            prompts=prompts,
            recent_accuracy=tuple(self._recent_accuracy),
            identity=self._identity,
            rollout=settled,
            unreported=self._unreported,
        )
        return _STATE.dump_json(state)

    async def _load(self, checkpoint: Path) -> None:
        allow_canary = "canary" in self._config.checkpoint.allow_changed
        await self._actor.load((checkpoint / ACTOR).absolute(), actor_digests(checkpoint), allow_canary)

    def _note_phase(self, phase: str) -> None:
        self._folder.note_phase(PhaseNote(self._num_steps_done + 1, phase, time.time(), self._started))

    def _is_accurate_enough(self) -> bool:
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
        "rollout/num_tokens_redrawn": stats.num_tokens_redrawn,
        "rollout/num_reward_errors": stats.num_samples_scored_by_default,
        "rollout/staleness_max": max((step - group.oldest_weight_version for group in rollout.groups), default=None),
    }
    return {name: value for name, value in row.items() if value is not None}
