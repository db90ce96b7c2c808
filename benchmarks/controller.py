"""What the controller itself costs: the real loop, sampler and verifiers over simulated engines and actor ranks.

    python -m benchmarks.controller
    python -m benchmarks.controller --profile

64 engines answer 512 prompts x 16 samples a rollout step (and more: two groups in five carry no signal), with log-normal lengths of
about 6,000 tokens on average that are cut at 20,480. Engines and ranks sleep for as long as they would work, scaled so that a rollout step
of 300 s takes 300 / `--speed-up` seconds; everything the controller's process does is real: reading the engines' messages, the verifiers'
parent side, dynamic sampling, the batch, the serialised share of each of 16 data-parallel ranks, metrics, and the controller's part of a
checkpoint every second step. Overhead is that process's CPU time, all threads, over 300 s.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import gc
import io
import math
import os
import pickle
import platform
import pstats
import random
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np

from benchmarks.verifier import reasoning
from dapo_megatron.config.schema import Config
from dapo_megatron.data.loader import PromptStream
from dapo_megatron.data.prompts import DataReport, PromptSet
from dapo_megatron.launcher.controller import Controller
from dapo_megatron.launcher.identity import RunIdentity
from dapo_megatron.launcher.run_folder import RunFolder
from dapo_megatron.rewards.workers import RewardWorkers
from dapo_megatron.rollout.engine import GenerateRequest, GenerateResult, SamplingParams
from dapo_megatron.rollout.sampler import SamplerRules
from dapo_megatron.rollout.wave_sampler import WaveSampler
from dapo_megatron.types import Prompt, Sample, TrainBatch
from dapo_megatron.weights.file_digest import FileDigest

STEP_SECONDS = 300.0
"""The simulated rollout step: 220 s of generation at the longest response, 70 s of training, 10 s of weight sync."""
TRAIN_SECONDS = 70.0
SYNC_SECONDS = 10.0
MAX_RESPONSE_TOKENS = 20_480
SECONDS_PER_TOKEN = (STEP_SECONDS - TRAIN_SECONDS - SYNC_SECONDS) / MAX_RESPONSE_TOKENS / 2
"""Half: dynamic sampling takes about two waves."""
CHARS_PER_TOKEN = 3.3
NUM_RANKS, TENSOR_PARALLEL_SIZE = 64, 4
VOCAB_SIZE = 152_064
ANSWER = "34"
NUM_MESSAGES = 96
"""Different groups that engines answer with."""


@dataclass(frozen=True, slots=True)
class Message:
    """What an engine sends for one group, as bytes, and how long it took."""

    payload: bytes
    simulated_seconds: float


def make_message(index: int, num_samples: int) -> Message:
    """Group `index` of the pool; about two in five are all right or all wrong."""
    rng, texts = np.random.default_rng(index), random.Random(index)
    lengths = np.minimum(rng.lognormal(math.log(4500), 0.75, num_samples).astype(int) + 1, MAX_RESPONSE_TOKENS)
    probability = rng.choice([0.0, 1.0, rng.uniform(0.1, 0.9)], p=[0.25, 0.15, 0.6])
    right = rng.random(num_samples) < probability
    samples = []
    for length, is_right in zip(lengths.tolist(), right.tolist(), strict=True):
        samples.append(
            Sample(
                token_ids=rng.integers(0, VOCAB_SIZE, length, dtype=np.int32),
                log_probs=-rng.exponential(0.3, length).astype(np.float32),
                weight_versions=np.zeros(length, np.int32),
                finish_reason="length" if length == MAX_RESPONSE_TOKENS else "stop",
                text=reasoning(int(length * CHARS_PER_TOKEN), texts)
                + f"\n\nAnswer: {ANSWER if is_right else texts.randrange(99)}",
            )
        )
    return Message(pickle.dumps(tuple(samples), protocol=5), float(lengths.max()) * SECONDS_PER_TOKEN)


class SimulatedEngine:
    """Answers all its requests side by side, the shortest first."""

    def __init__(self, messages: Sequence[Message], speed_up: float):
        self.weight_version = 0
        self._messages, self._speed_up = messages, speed_up

    async def generate(self, requests: Sequence[GenerateRequest]) -> AsyncIterator[GenerateResult]:
        """Requests in the order in which they complete."""
        mine = [(self._messages[request.request_id % len(self._messages)], request) for request in requests]
        slept = 0.0
        for message, request in sorted(mine, key=lambda pair: pair[0].simulated_seconds):
            await asyncio.sleep((message.simulated_seconds - slept) / self._speed_up)
            slept = message.simulated_seconds
            samples: tuple[Sample, ...] = pickle.loads(message.payload)
            versions = [np.full(len(sample.token_ids), self.weight_version, np.int32) for sample in samples]
            tagged = (replace(sample, weight_versions=version) for sample, version in zip(samples, versions, strict=True))
            yield GenerateResult(request.request_id, tuple(tagged))

    async def receive(self, message: int) -> int:
        """Weights are a number here."""
        return message


class SimulatedActor:
    """Serialises the shares as Ray does (pickle 5, arrays out of band, one copy into shared memory), then sleeps."""

    def __init__(self, config: Config, speed_up: float):
        self._data_parallel_size, self._speed_up = config.actor.data_parallel_size, speed_up
        self.share_bytes: list[int] = []
        self.serialise_seconds: list[float] = []

    async def train(self, batch: TrainBatch, rollout_step: int) -> dict[str, float]:
        """Sizes of the shares are kept."""
        start = time.perf_counter()
        for rank in range(self._data_parallel_size):
            self.share_bytes.append(serialise(batch.share(rank)))
        self.serialise_seconds.append(time.perf_counter() - start)
        await asyncio.sleep(TRAIN_SECONDS / self._speed_up)
        return {"actor/num_loss_tokens": sum(step.num_loss_tokens for step in batch.optimizer_steps)}

    async def send_weights(self, version: int) -> AsyncIterator[int]:
        """One message."""
        await asyncio.sleep(SYNC_SECONDS / self._speed_up)
        yield 1

    async def start_save(self, directory: Path) -> None:
        """Ranks write elsewhere."""

    async def save_is_written(self) -> bool:
        """At once."""
        return True

    async def finish_save(self) -> dict[str, FileDigest]:
        """No files."""
        return {}

    async def load(self, directory: Path, digests: Mapping[str, FileDigest], allow_canary: bool) -> None:
        """Never called."""
        raise NotImplementedError


def serialise(share: TrainBatch) -> int:
    """Bytes of what one data-parallel rank is sent."""
    buffers: list[pickle.PickleBuffer] = []
    head = pickle.dumps(share, protocol=5, buffer_callback=buffers.append)
    return len(head) + len(b"".join(buffer.raw() for buffer in buffers))


def make_config(folder: Path, num_steps: int) -> Config:
    """The sizes of the paper on 64 ranks."""
    return Config.model_validate(
        {
            "model": {"path": "unused"},
            "data": {"path": "unused"},
            "run": {"dir": str(folder)},
            "train": {"num_rollout_steps": num_steps, "num_prompts_per_step": 512, "num_samples_per_prompt": 16},
            "algo": {"overlong_cache_tokens": 4096},
            "actor": {
                "num_ranks": NUM_RANKS,
                "tensor_parallel_size": TENSOR_PARALLEL_SIZE,
                "max_tokens_per_micro_batch": 24_576,
            },
            "rollout": {"num_engines": 64, "max_response_tokens": MAX_RESPONSE_TOKENS},
            "checkpoint": {"every": 2, "keep_last": 1},
        }
    )


@dataclass(frozen=True, slots=True)
class StepCost:
    """One rollout step as it was measured."""

    wall_seconds: float
    cpu_seconds: float
    num_groups: int
    num_tokens: int
    resident_bytes: int


def rss() -> dict[str, int]:
    """`VmRSS` and `VmHWM` of this process, in bytes."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {parts[0].rstrip(":"): int(parts[1]) * 1024 for parts in lines if parts[0] in ("VmRSS:", "VmHWM:")}


async def run(config: Config, messages: Sequence[Message], speed_up: float) -> tuple[list[StepCost], SimulatedActor]:
    """Train over the simulation; the cost of every rollout step."""
    costs: list[StepCost] = []
    last = [0.0, 0.0]

    def report(row: Mapping[str, float]) -> None:
        gc.collect()
        wall, cpu = time.perf_counter(), time.process_time()
        groups, tokens = int(row["rollout/num_groups_generated"]), int(row["rollout/num_tokens_generated"])
        costs.append(StepCost(wall - last[0], cpu - last[1], groups, tokens, rss()["VmRSS"]))
        last[:] = [time.perf_counter(), time.process_time()]

    prompts = PromptSet(
        tuple(Prompt(index, tuple(range(200)), "?", ANSWER) for index in range(17_000)), DataReport(17_000, 0, 0, 0, ()), "0"
    )
    stream = PromptStream(prompts, 0, shuffle=True)
    engines = [SimulatedEngine(messages, speed_up) for _ in range(config.rollout.num_engines)]
    actor = SimulatedActor(config, speed_up)
    folder = RunFolder(config.run.dir)
    folder.create({})
    async with RewardWorkers(config.reward) as scorer:
        await scorer.wait_ready()
        params = SamplingParams(max_response_tokens=MAX_RESPONSE_TOKENS)
        rules = SamplerRules(num_samples_per_prompt=config.train.num_samples_per_prompt, params=params, seed=0)
        controller = Controller(
            config,
            actor=actor,
            engines=engines,
            sampler=WaveSampler(engines, scorer, stream, rules),
            prompts=stream,
            folder=folder,
            report=report,
            identity=RunIdentity({}),
        )
        last[:] = [time.perf_counter(), time.process_time()]
        await controller.run()
    return costs, actor


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--num-steps", type=int, default=5)
    parser.add_argument("--speed-up", type=float, default=20.0)
    parser.add_argument("--profile", action="store_true", help="print the functions of the event loop's thread that take longest")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        config = make_config(Path(folder), args.num_steps)
        messages = [make_message(index, config.train.num_samples_per_prompt) for index in range(NUM_MESSAGES)]
        base = rss()["VmRSS"]
        profile = cProfile.Profile()
        if args.profile:
            profile.enable()
        costs, actor = asyncio.run(run(config, messages, args.speed_up))
        profile.disable()

    print(f"{platform.machine()}, {os.cpu_count()} cores, python {platform.python_version()}, numpy {version('numpy')}")
    print(f"simulated step {STEP_SECONDS:.0f} s, sped up {args.speed_up:g} times; {base / 2**20:.0f} MiB before the first step")
    print("step  groups  Mtokens  wall s  CPU s  overhead %  resident MiB")
    for number, cost in enumerate(costs, start=1):
        print(
            f"{number:4d} {cost.num_groups:7d} {cost.num_tokens / 1e6:8.1f} {cost.wall_seconds:7.1f} {cost.cpu_seconds:6.2f} "
            f"{100 * cost.cpu_seconds / STEP_SECONDS:11.2f} {cost.resident_bytes / 2**20:13.0f}"
        )
    print(f"peak resident {rss()['VmHWM'] / 2**20:.0f} MiB")
    shares = actor.share_bytes[-config.actor.data_parallel_size :]
    print(f"shares: {len(shares)} of {min(shares) / 2**20:.1f} to {max(shares) / 2**20:.1f} MiB; serialising them took", end=" ")
    print(", ".join(f"{seconds:.2f}" for seconds in actor.serialise_seconds), "s")
    if args.profile:
        text = io.StringIO()
        pstats.Stats(profile, stream=text).sort_stats("cumtime").print_stats("dapo_megatron|benchmarks|pickle|collect")
        print(text.getvalue())


if __name__ == "__main__":
    main()
