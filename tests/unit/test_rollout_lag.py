"""The loop one step off-policy, over fakes: what overlaps, which weights draw and train which tokens, and exact resume."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from dapo_megatron.config.schema import Config, SglangEngineConfig
from dapo_megatron.data.loader import PromptStream
from dapo_megatron.data.prompts import DataReport, PromptSet
from dapo_megatron.launcher.controller import Controller, ControllerState, read_state
from dapo_megatron.launcher.held_weights import HeldWeights
from dapo_megatron.launcher.identity import RunIdentity
from dapo_megatron.launcher.run_folder import RunFolder
from dapo_megatron.rollout.engine import GenerateResult, SamplingParams
from dapo_megatron.rollout.router import Router
from dapo_megatron.rollout.sampler import SamplerRules
from dapo_megatron.rollout.wave_sampler import WaveSampler
from dapo_megatron.types import EngineEndpoint, EngineError, Prompt, Sample, Score, TrainBatch
from dapo_megatron.weights.transports.records import PushReport
from tests.unit.fake_server import FakeServer
from tests.unit.test_controller import FakeActor, FakeEngine, Scorer

PROMPTS = PromptSet(tuple(Prompt(i, (i, 6), "?", "0") for i in range(7)), DataReport(7, 0, 0, 0, ()), fingerprint="0")


class Engine(FakeEngine):
    """Tokens say which prompt and which weights they are from; `generating` is true while a call is open."""

    def __init__(self) -> None:
        super().__init__()
        self.generating = False

    async def generate(self, requests: Any) -> AsyncIterator[GenerateResult]:
        self.generating = True
        for request in requests:
            await asyncio.sleep(0)
            token = 100 * request.prompt_token_ids[0] + self.weight_version
            samples = (Sample((token,), (-0.5,), (self.weight_version,), "stop", str(i)) for i in range(request.num_samples))
            yield GenerateResult(request.request_id, tuple(samples))
        self.generating = False

    async def receive(self, message: str) -> int:
        assert not self.generating, "weights arrive while tokens are drawn"
        return await super().receive(message)


class Actor(FakeActor):
    """Keeps what it trained on: the tokens of each step."""

    def __init__(self) -> None:
        super().__init__()
        self.trained: list[list[int]] = []

    async def train(self, batch: TrainBatch, rollout_step: int) -> dict[str, float]:
        packed = [m for step in batch.optimizer_steps for rank in step.micro_batches for m in rank]
        self.trained.append([int(sample.token_ids[-1]) for micro_batch in packed for sample in micro_batch])
        await asyncio.sleep(0.001)
        return await super().train(batch, rollout_step)


class Run:
    """A controller with its fakes."""

    def __init__(
        self,
        folder: Path,
        num_steps: int,
        *,
        state: ControllerState | None = None,
        evaluate: Callable[[], Awaitable[dict[str, float]]] | None = None,
        engine: Any = None,
        actor: Any = None,
        max_response_tokens: int = 1024,
        **train: Any,
    ):
        config = Config.model_validate(
            {
                "model": {"path": "unused"},
                "data": {"path": "unused"},
                "run": {"dir": str(folder)},
                "eval": {"interval": 2},
                "train": {
                    "rollout_lag": 1,
                    "num_rollout_steps": num_steps,
                    "num_prompts_per_step": 2,
                    "num_samples_per_prompt": 2,
                    "num_updates_per_rollout": 1,
                    **train,
                },
                "checkpoint": {"every": 2, "keep_last": 9},
            }
        )
        self.actor, self.engine, self.rows, self.folder = actor or Actor(), engine or Engine(), [], RunFolder(folder)
        self.folder.create({})
        stream = PromptStream.restore(PROMPTS, 0, True, state.prompts) if state else PromptStream(PROMPTS, 0, True)
        params = SamplingParams(max_response_tokens=max_response_tokens)
        rules = SamplerRules(num_samples_per_prompt=2, params=params, seed=0, lag=1)
        self.sampler = WaveSampler(
            [self.engine], FirstIsRight() if engine else Scorer({"0"}), stream, rules, state.sampler if state else None
        )
        self.controller = Controller(
            config,
            actor=self.actor,
            engines=[self.engine],
            sampler=self.sampler,
            prompts=stream,
            folder=self.folder,
            report=self.rows.append,
            identity=RunIdentity({}),
            evaluate=evaluate,
            state=state,
        )


async def test_a_step_trains_on_tokens_of_the_weights_before_and_the_first_one_on_its_own(tmp_path: Path):
    run = Run(tmp_path, 4)
    await run.controller.run()
    assert [{token % 100 for token in step} for step in run.actor.trained] == [{0}, {0}, {1}, {2}]
    assert [row["rollout/staleness_max"] for row in run.rows] == [0, 1, 1, 1]
    assert [row["weights/version"] for row in run.rows] == [0, 1, 2, 4], "the last weights are sent when the run ends"
    assert [call for call in run.actor.calls if call[0] in ("send", "train")] == [
        *(("send", 0), ("train", 0), ("send", 1), ("train", 1)),
        *(("send", 2), ("train", 2), ("train", 3), ("send", 4)),
    ]


async def test_the_next_rollout_runs_while_a_step_trains(tmp_path: Path):
    """A deadlock, and with it the time-out, if either waited for the other."""
    run = Run(tmp_path, 3)
    train, generate = run.actor.train, run.engine.generate
    calls = {"generate": 0, "train": 0}
    drawing = [asyncio.Event() for _ in range(4)]
    training = [asyncio.Event() for _ in range(4)]

    async def train_while_drawing(batch: TrainBatch, rollout_step: int) -> dict[str, float]:
        training[rollout_step].set()
        if rollout_step < 2:
            await drawing[rollout_step + 1].wait()
        return await train(batch, rollout_step)

    async def draw_while_training(requests: Any) -> AsyncIterator[GenerateResult]:
        number, calls["generate"] = calls["generate"], calls["generate"] + 1
        drawing[number].set()
        if number:
            await training[number - 1].wait()
        async for result in generate(requests):
            yield result

    run.actor.train, run.engine.generate = train_while_drawing, draw_while_training
    async with asyncio.timeout(10):
        await run.controller.run()
    assert len(run.rows) == 3
    assert all(row["time/rollout_wait_seconds"] <= row["time/rollout_seconds"] for row in run.rows[1:])


@pytest.mark.parametrize("saved", [2, 4])
async def test_a_run_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(tmp_path: Path, saved: int):
    whole = Run(tmp_path / "whole", 7)
    await whole.controller.run()
    checkpoint = tmp_path / "whole" / "checkpoints" / f"step_{saved:06d}"
    state = read_state(checkpoint)
    assert state.rollout is not None
    rest = Run(tmp_path / "rest", 7, state=state)
    await rest.controller.run(checkpoint)
    assert rest.actor.trained == whole.actor.trained[saved:]
    clock = ("time/", "throughput/", "checkpoint/")
    now, before = ([{k: v for k, v in row.items() if not k.startswith(clock)} for row in run.rows] for run in (rest, whole))
    assert now == before[saved:]
    assert rest.sampler.state() == whole.sampler.state()


async def test_an_evaluation_sees_the_newest_weights_and_engines_that_are_free(tmp_path: Path):
    seen = []

    async def evaluate() -> dict[str, float]:
        seen.append((run.engine.weight_version, run.engine.generating))
        return {"eval/accuracy": 0.5}

    run = Run(tmp_path, 5, evaluate=evaluate)
    await run.controller.run()
    assert seen == [(2, False), (4, False), (5, False)]
    assert [{token % 100 for token in step} for step in run.actor.trained] == [{0}, {0}, {1}, {2}, {3}]


async def test_a_run_that_stops_early_keeps_the_rollout_it_did_not_train_on(tmp_path: Path):
    run = Run(tmp_path, 50, stop_at_accuracy=0.5)
    await run.controller.run()
    newest = run.folder.newest_checkpoint()
    assert len(run.rows) == 10 and newest is not None
    rollout = read_state(newest).rollout
    assert rollout is not None and len(rollout.groups) == 2


async def test_an_engine_that_fails_beside_training_ends_the_run(tmp_path: Path):
    run = Run(tmp_path, 5)
    generate = run.engine.generate

    async def fail_later(requests: Any) -> AsyncIterator[GenerateResult]:
        if run.actor.trained:
            raise EngineError("engine 0 is gone")
        async for result in generate(requests):
            yield result

    run.engine.generate = fail_later
    with pytest.raises(EngineError, match="engine 0 is gone"):
        await run.controller.run()
    assert 1 <= len(run.rows) <= 2


async def test_training_that_fails_leaves_no_rollout_behind(tmp_path: Path):
    run = Run(tmp_path, 5)
    ended = []

    async def endless(requests: Any) -> AsyncIterator[GenerateResult]:
        try:
            await asyncio.Event().wait()
            yield
        finally:
            ended.append(True)

    async def train(batch: TrainBatch, rollout_step: int) -> dict[str, float]:
        if rollout_step:
            run.engine.generate = endless
            await asyncio.sleep(0.01)
            raise EngineError("rank 0 is gone")
        return {"actor/num_loss_tokens": 1}

    run.actor.train = train
    with pytest.raises(EngineError, match="rank 0 is gone"):
        await run.controller.run()
    assert ended == [True]


class FirstIsRight:
    """Of each group."""

    async def score(self, responses: Any, answer: str) -> tuple[Score, ...]:
        return tuple(Score(float(index == 0), index == 0) for index, _ in enumerate(responses))


class PushingActor(Actor):
    """Sends its weights to fake servers, which then bear the version; `at_train` runs at the end of each training."""

    def __init__(self, servers: dict[str, FakeServer], at_train: Callable[[int], Awaitable[None]]) -> None:
        super().__init__()
        self.servers, self.at_train = servers, at_train
        self.held = HeldWeights(self.push_weights)

    async def train(self, batch: TrainBatch, rollout_step: int) -> dict[str, float]:
        with self.held.while_training(rollout_step):
            metrics = await super().train(batch, rollout_step)
            await self.at_train(rollout_step)
            return metrics

    async def push_weights(self, version: int, endpoints: Sequence[EngineEndpoint]) -> PushReport:
        self.held.are(version)
        self.calls.append(("send", version))
        for endpoint in endpoints:
            self.servers[endpoint.name].weight_version = version
        return PushReport(version, 1, 1.0, 0.0, 1.0)


async def test_the_only_engine_dies_while_a_step_trains_and_the_run_goes_on_with_newer_weights(tmp_path: Path):
    """The next rollout is in flight then, and the actor holds the weights no more that it began with."""
    servers = {"engine 0": FakeServer("engine 0", seconds_per_token=0.005)}

    async def restart(name: str) -> EngineEndpoint:
        servers[name] = FakeServer(name)
        return await servers[name].start()

    async def die_in_step_1(rollout_step: int) -> None:
        if rollout_step == 1:
            servers["engine 0"].generated.clear()
            await servers["engine 0"].generated.wait()
            await servers["engine 0"].die()

    actor = PushingActor(servers, die_in_step_1)
    config = SglangEngineConfig(health_interval_seconds=0.02, restart_deadline_seconds=600)
    endpoints = [await servers["engine 0"].start()]
    router = Router(endpoints, config, lambda rows: [str(row) for row in rows], restart=restart, keeper=actor.held)
    run = Run(tmp_path, 4, engine=router, actor=actor, max_response_tokens=20)
    try:
        async with asyncio.timeout(30):
            await run.controller.run()
    finally:
        await router.close()
        await servers["engine 0"].die()
    assert len(run.rows) == 4 and router.num_engines_lost == 1
    assert [row["rollout/staleness_max"] for row in run.rows] == [0, 1, 0, 1], "step 3 trains on what its own weights drew"
    calls = [call for call in actor.calls if call[0] in ("send", "train")]
    assert calls == [
        *(("send", 0), ("train", 0), ("send", 1), ("train", 1), ("send", 2)),  # to the engine that came back
        *(("send", 2), ("train", 2), ("train", 3), ("send", 4)),
    ]
