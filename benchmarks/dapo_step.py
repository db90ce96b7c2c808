"""One DAPO step, generation and training, against TRL's GRPOTrainer (`loss_type="dapo"`, no vLLM) on CPU.

    pip install 'dapo-megatron[bench,smollm2]'
    python -m benchmarks.dapo_step --model smollm2
    python -m benchmarks.dapo_step --model tiny
    python -m benchmarks.dapo_step --model quickstart

`tiny` is a Llama of a million parameters (4 layers, width 128) over the quick start's prompts, `quickstart` the quick start's own, a sixth
of that.

Both sides train the same weights on the same prompts in the same order: as many samples, of the same fixed length, in fp32, with the
whole machine's cores each; our rank and engine live in one process (`--backend ray`: in two). Both are alive during the run and take
turns, a step each. The first steps are untimed: they warm up and have their memory sampled (private pages of all processes of a side, and what it adds to /dev/shm).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import platform
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from dapo_megatron.config.schema import Config
from dapo_megatron.examples import max_of_two, smollm2

LEARNING_RATE = 2e-5
MEMORY_PERIOD_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Setting:
    """What both sides do; `prepare` makes the model and returns the problems."""

    prepare: Callable[[Config], list[str]]
    num_prompts: int
    num_samples: int
    num_response_tokens: int
    chat: bool
    trl_micro_batch: int
    num_timed_steps: int
    actor: dict[str, Any]

    @property
    def num_tokens(self) -> int:
        """Generated and trained tokens of a step."""
        return self.num_prompts * self.num_samples * self.num_response_tokens


@dataclass(frozen=True, slots=True)
class Step:
    """Wall-clock seconds of a step and of its phases, where the side reports them."""

    seconds: float
    phases: dict[str, float]


def reward(response: str) -> float:
    """Differs between samples of a prompt, so that every sample has an advantage; costs nothing."""
    return sum(map(ord, response)) % 97 / 97


def score(response: str, answer: str) -> float:
    """`reward` as our reward function."""
    return reward(response)


def run_config(setting: Setting, folder: Path, backend: str = "local") -> Config:
    """Our side's config; the model lies in `folder/model`, prompts in `folder/prompts.jsonl`."""
    return Config.model_validate(
        {
            "run": {"dir": folder / "run"},
            "model": {"path": folder / "model", "dtype": "fp32"},
            "data": {"path": str(folder / "prompts.jsonl"), "chat_template": setting.chat, "shuffle": False},
            "reward": {"type": "custom", "function": "benchmarks.dapo_step:score", "num_workers": os.cpu_count()},
            "algo": {"dynamic_sampling": False},
            "train": {
                "num_rollout_steps": 10_000,
                "num_prompts_per_step": setting.num_prompts,
                "num_samples_per_prompt": setting.num_samples,
                "num_updates_per_rollout": 1,
            },
            "actor": {
                "num_threads": os.cpu_count(),
                "optimizer": {"lr": LEARNING_RATE, "num_warmup_rollout_steps": 0, "weight_decay": 0.0},
                **setting.actor,
            },
            "rollout": {"max_response_tokens": setting.num_response_tokens, "weight_bucket_mib": 64},
            "checkpoint": {"every": 0},
            "cluster": {"backend": backend},
        }
    )


class TurnsOver(Exception):
    """The parent asks for no more steps."""


def take_turn(turns: Connection) -> None:
    """Wait until this side may run its next step."""
    if not turns.recv():
        raise TurnsOver


def run_ours(setting: Setting, folder: Path, turns: Connection, backend_name: str) -> None:
    """The controller's loop with real ranks, engine and reward workers; waits for its turn between steps."""
    from dapo_megatron.data.loader import PromptStream
    from dapo_megatron.data.prompts import load_prompts
    from dapo_megatron.launcher.backends import backend, session
    from dapo_megatron.launcher.controller import Controller
    from dapo_megatron.launcher.identity import identity_of
    from dapo_megatron.launcher.run_folder import RunFolder
    from dapo_megatron.rewards.workers import RewardWorkers
    from dapo_megatron.rollout.wave_sampler import WaveSampler
    from dapo_megatron.train import load_tokenizer, sampler_rules

    config = run_config(setting, folder, backend_name)
    run_folder = RunFolder(config.run.dir)
    run_folder.create({})
    prompt_set = load_prompts(config.data, load_tokenizer(config.model.path))
    prompts = PromptStream(prompt_set, seed=0, shuffle=False)
    rules = sampler_rules(config)
    rules = replace(rules, params=replace(rules.params, stop_token_ids=()))  # fixed lengths

    def report(row: Any) -> None:
        assert row["actor/num_loss_tokens"] == setting.num_tokens
        phases = {phase: row[f"time/{phase}_seconds"] for phase in ("rollout", "train", "sync")}
        turns.send(Step(row["time/step_seconds"], phases))
        take_turn(turns)

    async def drive() -> None:
        async with RewardWorkers(config.reward) as scorer:
            await scorer.wait_ready()
            sampler = WaveSampler(processes.engines, scorer, prompts, rules)
            controller = Controller(
                config,
                actor=processes.actor,
                engines=processes.engines,
                sampler=sampler,
                prompts=prompts,
                folder=run_folder,
                report=report,
                identity=identity_of(config, prompt_set.fingerprint),
            )
            turns.send("ready")
            take_turn(turns)
            await controller.run()

    with session(config), backend(config, run_folder.logs) as processes, contextlib.suppress(TurnsOver):
        asyncio.run(drive())


def run_trl(setting: Setting, folder: Path, turns: Connection, bf16: bool) -> None:
    """GRPOTrainer, one process; gradient checkpointing off and fp32, which are faster here than its defaults."""
    import torch
    import transformers
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(os.cpu_count() or 1)
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    prompts = [[{"role": "user", "content": row["problem"]}] if setting.chat else row["problem"] for row in rows]
    num_completions = setting.num_prompts * setting.num_samples
    arguments = GRPOConfig(
        output_dir=str(folder / "trl"),
        loss_type="dapo",
        epsilon=0.2,
        epsilon_high=0.28,
        beta=0.0,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        per_device_train_batch_size=setting.trl_micro_batch,
        gradient_accumulation_steps=num_completions // setting.trl_micro_batch,
        num_generations=setting.num_samples,
        max_completion_length=setting.num_response_tokens,
        generation_kwargs={"min_new_tokens": setting.num_response_tokens},
        use_cpu=True,
        bf16=bf16,
        gradient_checkpointing=False,
        shuffle_dataset=False,
        max_steps=10_000,
        logging_steps=10_000,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )

    class Turns(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            take_turn(turns)
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            turns.send(Step(time.perf_counter() - self.start, {}))

    def rewards(completions: list, **_: Any) -> list[float]:
        return [reward(text[0]["content"] if setting.chat else text) for text in completions]

    trainer = GRPOTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32),
        reward_funcs=rewards,
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder / "model", padding_side="left"),
        callbacks=[Turns()],
    )
    turns.send("ready")
    with contextlib.suppress(TurnsOver):
        trainer.train()


class Side:
    """One of the two, in a process of its own."""

    def __init__(self, name: str, target: Any, *args: Any):
        context = multiprocessing.get_context("spawn")
        self.name = name
        self.steps: list[Step] = []
        self.peak_bytes = 0
        self._shared_bytes_before = _shared_memory_bytes()
        self._turns, other_end = context.Pipe()
        self._process = context.Process(target=target, args=(*args[:2], other_end, *args[2:]))
        self._process.start()
        other_end.close()
        assert self._turns.recv() == "ready"

    def warm_up(self) -> None:
        """One step, untimed, with its memory sampled."""
        done = threading.Event()
        sampler = threading.Thread(target=self._sample_memory, args=(done,))
        sampler.start()
        self._step()
        done.set()
        sampler.join()

    def step(self) -> None:
        """One timed step."""
        self.steps.append(self._step())

    def stop(self) -> None:
        """End the process."""
        self._turns.send(False)
        self._process.join()

    def _step(self) -> Step:
        self._turns.send(True)
        return self._turns.recv()

    def _sample_memory(self, done: threading.Event) -> None:
        root = psutil.Process(self._process.pid)
        while not done.wait(MEMORY_PERIOD_SECONDS):
            private = sum(map(_private_bytes, [root, *root.children(recursive=True)]))
            self.peak_bytes = max(self.peak_bytes, private + _shared_memory_bytes() - self._shared_bytes_before)


def _private_bytes(process: psutil.Process) -> int:
    try:
        memory = process.memory_info()
    except psutil.NoSuchProcess:
        return 0
    return memory.rss - memory.shared


def _shared_memory_bytes() -> int:
    return psutil.disk_usage("/dev/shm").used


def prepare(setting: Setting, folder: Path) -> None:
    """The model, where it is missing, and the prompts in `folder`."""
    problems = setting.prepare(run_config(setting, folder))
    lines = [json.dumps({"problem": problem, "answer": "0"}) + "\n" for problem in problems]
    (folder / "prompts.jsonl").write_text("".join(lines))


def _smollm2(config: Config) -> list[str]:
    smollm2.prepare(config)
    return _word_problems()


def _quickstart(config: Config) -> list[str]:
    max_of_two.prepare(config)
    return [f"{a},{b}>" for a, b in max_of_two.split_pairs()[0]]


def _tiny(config: Config) -> list[str]:
    """1.05 million parameters, random."""
    if not config.model.path.exists():
        import torch
        from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

        config.model.path.mkdir()
        max_of_two.save_tokenizer(config.model.path)
        tokenizer = AutoTokenizer.from_pretrained(config.model.path)
        torch.manual_seed(0)
        shape = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=64,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        LlamaForCausalLM(shape).save_pretrained(config.model.path)
    return _quickstart(config)


def _word_problems() -> list[str]:
    """Additions of two-digit numbers."""
    draw = random.Random(0)
    names, things = ("Ana", "Ben", "Cleo", "Dan"), ("apples", "books", "coins", "stamps")
    return [
        f"{name} has {draw.randint(10, 99)} {thing}. {other} gives {name} {draw.randint(10, 99)} more {thing}. "
        f"How many {thing} does {name} have now? Explain in one sentence, then give the number."
        for name in names
        for other in names
        for thing in things
        if name != other
    ]


SETTINGS = {
    "smollm2": Setting(_smollm2, 8, 8, 48, True, 16, 2, {"max_tokens_per_micro_batch": 2048}),
    "tiny": Setting(_tiny, 16, 16, 2, False, 256, 50, {"max_tokens_per_micro_batch": 4096}),
    "quickstart": Setting(_quickstart, 16, 16, 2, False, 256, 50, {"max_tokens_per_micro_batch": 4096}),
}


def main() -> None:
    """Run both sides and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SETTINGS, default="smollm2")
    parser.add_argument("--steps", type=int, help="timed steps of each side")
    parser.add_argument("--side", choices=("both", "ours", "trl"), default="both")
    parser.add_argument("--backend", choices=("local", "ray"), default="local", help="processes of our side, as cluster.backend")
    parser.add_argument("--response-tokens", type=int, help="generated tokens of a sample")
    parser.add_argument("--trl-micro-batch", type=int)
    parser.add_argument("--trl-bf16", action="store_true", help="TRL's default precision, slower on a CPU without AMX")
    parser.add_argument("--model-dir", type=Path, help="an HF directory made by an earlier run; made when missing")
    arguments = parser.parse_args()
    setting = SETTINGS[arguments.model]
    if arguments.response_tokens:
        setting = replace(setting, num_response_tokens=arguments.response_tokens)
    if arguments.trl_micro_batch:
        setting = replace(setting, trl_micro_batch=arguments.trl_micro_batch)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.model_dir:
            (folder / "model").symlink_to(arguments.model_dir.absolute())
        prepare(setting, folder)
        sides = []
        if arguments.side in ("both", "ours"):
            sides.append(Side("dapo-megatron", run_ours, setting, folder, arguments.backend))
        if arguments.side in ("both", "trl"):
            sides.append(Side(f"TRL {version('trl')}", run_trl, setting, folder, arguments.trl_bf16))
        try:
            for side in sides:
                side.warm_up()
            for _ in range(setting.num_timed_steps if arguments.steps is None else arguments.steps):
                for side in sides:
                    side.step()
        finally:
            for side in sides:
                side.stop()
    print_table(setting, sides)


def print_table(setting: Setting, sides: list[Side]) -> None:
    """Medians, spread, memory, ratio."""
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores; torch {version('torch')}")
    for side in sides:
        seconds = [step.seconds for step in side.steps]
        median = statistics.median(seconds)
        phases = {phase: round(statistics.median(step.phases[phase] for step in side.steps), 3) for phase in side.steps[0].phases}
        print(
            f"{side.name:16} {median:8.3f} s a step (min {min(seconds):.3f}, max {max(seconds):.3f}, n {len(seconds)})  "
            f"{setting.num_tokens / median:8.1f} tokens/s  peak {side.peak_bytes / 2**30:.2f} GiB  {phases or ''}"
        )
    if len(sides) == 2:
        ours, trl = (statistics.median(step.seconds for step in side.steps) for side in sides)
        print(f"ratio {trl / ours:.2f}")


if __name__ == "__main__":
    main()
