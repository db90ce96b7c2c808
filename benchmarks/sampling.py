"""What waves, streaming, partial rollouts and a step of lag cost in time and tokens, over simulated engines and a simulated actor.

    python -m benchmarks.sampling

The controller's loop, the samplers and the batch are the real ones; engines and actor live on a clock that jumps, so the result does not
depend on the machine. 8 engines, 64 prompts x 16 samples a step, log-normal lengths of about 6,000 tokens cut at 20,480, two groups in five
without signal. An engine decodes up to 256 sequences together; a token of all of them takes 8 ms + 0.03 ms a sequence. Training
takes 70 s, a weight sync 5 s. Prefill and verdicts take no time.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import selectors
import tempfile
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dapo_megatron.config.schema import Config
from dapo_megatron.data.loader import PromptStream
from dapo_megatron.data.prompts import DataReport, PromptSet
from dapo_megatron.launcher.controller import Controller
from dapo_megatron.launcher.identity import RunIdentity
from dapo_megatron.launcher.run_folder import RunFolder
from dapo_megatron.rollout.engine import GenerateRequest, GenerateResult, HoldsNothing, SamplingParams
from dapo_megatron.rollout.sampler import SamplerRules
from dapo_megatron.train import sampler_type
from dapo_megatron.types import FinishReason, Prompt, Sample, Score, TrainBatch
from dapo_megatron.weights.file_digest import FileDigest

NUM_ENGINES, NUM_PROMPTS, NUM_SAMPLES = 8, 64, 16
MAX_RESPONSE_TOKENS, MAX_ROWS = 20_480, 256
STEP_SECONDS, SECONDS_PER_ROW = 8e-3, 3e-5
TRAIN_SECONDS, SYNC_SECONDS = 70.0, 5.0
WARM_UP_STEPS = 3


class JumpingLoop(asyncio.SelectorEventLoop):
    """Its clock stands still while something runs and jumps to the next timer when nothing does."""

    def __init__(self) -> None:
        self._now = 0.0
        super().__init__(_JumpingSelector(self))

    def time(self) -> float:
        return self._now

    def jump(self, seconds: float) -> None:
        self._now += seconds


class _JumpingSelector(selectors.SelectSelector):
    def __init__(self, loop: JumpingLoop):
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout:
            self._loop.jump(timeout)
        return super().select(0 if timeout is None or timeout > 0 else timeout)


@dataclass(eq=False, slots=True)
class _Job:
    """A request in work."""

    request: GenerateRequest
    version: int
    samples: list[Sample | None]
    ended: asyncio.Future[GenerateResult]
    num_rows: int = 0


@dataclass(eq=False, slots=True)
class _Row:
    """A sample in work; `num_tokens` counts those of an earlier call too."""

    job: _Job
    index: int
    length: int
    num_tokens: float


class SimulatedEngine(HoldsNothing):
    """Decodes its rows side by side, each token of all of them in the same time; more requests than rows wait."""

    def __init__(self) -> None:
        self.weight_version = 0
        self._rows: list[_Row] = []
        self._waiting: list[_Row] = []
        self._changed = asyncio.Event()
        self._decoder: asyncio.Task[None] | None = None
        self._last = 0.0

    async def generate(self, requests: Sequence[GenerateRequest]) -> AsyncIterator[GenerateResult]:
        """Requests in the order in which they complete."""
        for ended in asyncio.as_completed([self._enter(request).ended for request in requests]):
            yield await ended

    def _enter(self, request: GenerateRequest) -> _Job:
        rng = np.random.default_rng(request.seed)
        lengths = np.minimum(rng.lognormal(math.log(4500), 0.75, request.num_samples).astype(int) + 1, MAX_RESPONSE_TOKENS)
        samples: list[Sample | None] = list(request.started) or [None] * request.num_samples
        job = _Job(request, self.weight_version, samples, asyncio.get_running_loop().create_future())
        for index, (length, started) in enumerate(zip(lengths.tolist(), samples, strict=True)):
            if started is None or started.finish_reason == "abort":
                self._waiting.append(_Row(job, index, length, 0 if started is None else len(started.token_ids)))
                job.num_rows += 1
        self._changed.set()
        if self._decoder is None or self._decoder.done():
            self._last = asyncio.get_running_loop().time()
            self._decoder = asyncio.create_task(self._decode())
        return job

    async def abort(self, request_ids: Collection[int]) -> None:
        """They end with what they have."""
        self._advance()
        for row in [row for row in (*self._rows, *self._waiting) if row.job.request.request_id in request_ids]:
            self._end(row, "abort")
        self._changed.set()

    async def receive(self, message: int) -> int:
        """Weights are a number here."""
        return message

    async def _decode(self) -> None:
        while self._rows or self._waiting:
            free = MAX_ROWS - len(self._rows)
            self._rows += self._waiting[:free]
            del self._waiting[:free]
            self._changed.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(min(row.length - row.num_tokens for row in self._rows) * self._seconds_per_token):
                    await self._changed.wait()
            self._advance()
            for row in [row for row in self._rows if row.num_tokens >= row.length - 1e-6]:
                self._end(row, "length" if row.length == MAX_RESPONSE_TOKENS else "stop")

    @property
    def _seconds_per_token(self) -> float:
        return STEP_SECONDS + SECONDS_PER_ROW * len(self._rows)

    def _advance(self) -> None:
        now = asyncio.get_running_loop().time()
        for row in self._rows:
            row.num_tokens = min(row.num_tokens + (now - self._last) / self._seconds_per_token, row.length)
        self._last = now

    def _end(self, row: _Row, finish_reason: FinishReason) -> None:
        (self._rows if row in self._rows else self._waiting).remove(row)
        job, before = row.job, row.job.samples[row.index]
        count = row.length if finish_reason != "abort" else int(row.num_tokens)
        versions = np.full(count, job.version, np.int32)
        if before is not None:
            versions[: len(before.token_ids)] = before.weight_versions
        tokens = np.zeros(count, np.int32)
        text = "right" if is_right(job.request, row.index) else "wrong"
        job.samples[row.index] = Sample(tokens, tokens.astype(np.float32), versions, finish_reason, text)
        job.num_rows -= 1
        if not job.num_rows:
            samples = tuple(sample for sample in job.samples if sample is not None)
            job.ended.set_result(GenerateResult(job.request.request_id, samples))


def is_right(request: GenerateRequest, index: int) -> bool:
    """About a quarter of the groups is all wrong and a seventh all right."""
    rng = np.random.default_rng(request.seed + 1)
    probability = rng.choice([0.0, 1.0, rng.uniform(0.1, 0.9)], p=[0.25, 0.15, 0.6])
    return bool(rng.random(request.num_samples)[index] < probability)


class SimulatedActor:
    """Sleeps for as long as it would train."""

    async def train(self, batch: TrainBatch, rollout_step: int) -> dict[str, float]:
        await asyncio.sleep(TRAIN_SECONDS)
        return {"actor/num_loss_tokens": sum(step.num_loss_tokens for step in batch.optimizer_steps)}

    async def send_weights(self, version: int) -> AsyncIterator[int]:
        await asyncio.sleep(SYNC_SECONDS)
        yield 1

    async def start_save(self, directory: Path) -> None: ...
    async def save_is_written(self) -> bool:
        return True

    async def finish_save(self) -> Mapping[str, FileDigest]:
        return {}

    async def load(self, directory: Path, digests: Mapping[str, FileDigest], allow_canary: bool) -> None:
        raise NotImplementedError


class Scorer:
    """By the text."""

    async def score(self, responses: Sequence[str], answer: str) -> tuple[Score, ...]:
        return tuple(Score(1.0 if text == "right" else -1.0, text == "right") for text in responses)


CASES: Mapping[str, dict[str, Any]] = {
    "waves": {},
    "streaming, aborts": {"rollout": {"sampler": "streaming", "in_flight_margin": 0.5}},
    "streaming, no margin": {"rollout": {"sampler": "streaming", "partial_rollout": True, "max_staleness": 4}},
    "streaming, partial": {
        "rollout": {"sampler": "streaming", "partial_rollout": True, "in_flight_margin": 0.5, "max_staleness": 4},
    },
    "waves, lag 1": {"train": {"rollout_lag": 1}, "rollout": {"max_staleness": 2}},
    "streaming, partial, lag 1": {
        "train": {"rollout_lag": 1},
        "rollout": {"sampler": "streaming", "partial_rollout": True, "in_flight_margin": 0.5, "max_staleness": 5},
    },
}


def make_config(folder: Path, num_steps: int, case: dict[str, Any]) -> Config:
    """The case's settings on top of the common sizes."""
    sizes = {"num_rollout_steps": num_steps, "num_prompts_per_step": NUM_PROMPTS, "num_samples_per_prompt": NUM_SAMPLES}
    return Config.model_validate(
        {
            "model": {"path": "unused"},
            "data": {"path": "unused"},
            "run": {"dir": str(folder)},
            "train": {**sizes, **case.get("train", {})},
            "rollout": {"max_response_tokens": MAX_RESPONSE_TOKENS, **case.get("rollout", {})},
            "checkpoint": {"every": 0},
        }
    )


async def run(config: Config) -> tuple[list[dict[str, float]], list[float]]:
    """The rows, and the simulated time at the end of each step."""
    rows: list[dict[str, float]] = []
    ends: list[float] = []

    def report(row: Mapping[str, float]) -> None:
        rows.append(dict(row))
        ends.append(asyncio.get_running_loop().time())

    problems = tuple(Prompt(index, (1, 2, 3), "?", "") for index in range(100_000))
    prompts = PromptStream(PromptSet(problems, DataReport(len(problems), 0, 0, 0, ()), "0"), 0, shuffle=True)
    engines = [SimulatedEngine() for _ in range(NUM_ENGINES)]
    rules = SamplerRules(
        num_samples_per_prompt=NUM_SAMPLES,
        params=SamplingParams(max_response_tokens=MAX_RESPONSE_TOKENS),
        seed=0,
        max_staleness=config.rollout.max_staleness,
        lag=config.train.rollout_lag,
        in_flight_margin=config.rollout.in_flight_margin,
        partial_rollout=config.rollout.partial_rollout,
    )
    folder = RunFolder(config.run.dir)
    folder.create({})
    controller = Controller(
        config,
        actor=SimulatedActor(),
        engines=engines,
        sampler=sampler_type(config)(engines, Scorer(), prompts, rules),
        prompts=prompts,
        folder=folder,
        report=report,
        identity=RunIdentity({}),
    )
    await controller.run()
    return rows, ends


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--num-steps", type=int, default=15)
    args = parser.parse_args()
    print(f"{'':26} step s   tokens a step   used  dropped  stale  aborted  staleness  length trained on")
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as folder, asyncio.Runner(loop_factory=JumpingLoop) as runner:
            rows, ends = runner.run(run(make_config(Path(folder), args.num_steps, case)))
        steady = rows[WARM_UP_STEPS:]
        generated = total(steady, "rollout/num_tokens_generated")
        used, stale, aborted = (total(steady, f"rollout/num_tokens_{fate}") / generated for fate in ("used", "stale", "aborted"))
        dropped = total(steady, "rollout/num_tokens_zero_variance") / generated
        seconds = (ends[-1] - ends[WARM_UP_STEPS - 1]) / len(steady)
        length = total(steady, "rollout/num_tokens_used") / total(steady, "rollout/num_groups_kept") / NUM_SAMPLES
        print(
            f"{name:26} {seconds:6.0f} {generated / len(steady) / 1e6:13.2f} M {used:6.1%} {dropped:8.1%} {stale:6.1%} {aborted:8.1%} "
            f"{max(row['rollout/staleness_max'] for row in steady):10.0f} {length:18.0f}"
        )


def total(rows: Sequence[Mapping[str, float]], name: str) -> float:
    """Over the rows."""
    return sum(row[name] for row in rows)


if __name__ == "__main__":
    main()
