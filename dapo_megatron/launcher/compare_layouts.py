"""`dapo-megatron compare-layouts`: one batch trained on under two layouts, by real ranks, and what differs.

Without a GPU, or with --shrink, the model is a random one of the same family and heads with narrow layers (`models/shrink.py`), in
fp32: layouts differ by rounding alone there, and a wrong one by orders of magnitude more.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from dapo_megatron.actor.replayed import Comparison, Replay, Tolerance, compare
from dapo_megatron.algo.train_batch import cut_optimizer_step
from dapo_megatron.config.checks import check_layout, read_hf_config
from dapo_megatron.config.load import load_config
from dapo_megatron.config.schema import ActorConfig, Config
from dapo_megatron.launcher.controller import train_batch_rules
from dapo_megatron.launcher.recorded_batch import RecordedBatch, read_recorded
from dapo_megatron.models.shrink import shrunk_for, write_random_model
from dapo_megatron.types import ConfigError, TrainBatch, TrainSample
from dapo_megatron.weights.hf_files import HfFiles

TOLERANCES = {"fp32": Tolerance(direct=1e-5, after_adam=1e-2), "bf16": Tolerance(direct=5e-2, after_adam=math.inf)}
"""By dtype. In bf16 a step of lr is mostly below a weight's last digit: how weights change says nothing."""
NUM_WORST = 10
SHRUNK_TOKENS_PER_MICRO_BATCH = 96
"""A few micro-batches per optimizer step of the generated batch."""
SAMPLES_PER_PROMPT = 4
"""Of the generated batch."""


@dataclass(frozen=True, slots=True)
class Request:
    """What the command was asked: config files, overrides of both sides and of each, and how to run."""

    files: Sequence[Path]
    overrides: Sequence[str]
    a: Sequence[str]
    b: Sequence[str]
    num_ranks: int | None
    batch: Path | None
    shrink: bool | None
    """None: where there is no GPU."""
    num_updates: int
    num_samples: int
    """Per optimizer step, generated or taken from the recorded batch."""
    tolerance: float | None
    as_json: bool


def compare_layouts(request: Request, console: Console) -> int:
    """Returns the exit code: 0 when the layouts agree, 1 when they do not. Raises ConfigError for a layout that cannot run."""
    shrink = request.shrink if request.shrink is not None else not torch.cuda.is_available()
    asked = {name: _load(request, side, []) for name, side in _sides(request).items()}
    original = read_hf_config(asked["A"].model.path)
    _require_possible(asked, original)
    with tempfile.TemporaryDirectory() as folder:
        overrides: list[str] = []
        if shrink:
            hf_config = shrunk_for(original, [config.actor for config in asked.values()])
            write_random_model(hf_config, Path(folder) / "model", asked["A"].run.seed)
            overrides = [
                f"--model.path={Path(folder) / 'model'}",
                "--model.dtype=fp32",
                f"--actor.max_tokens_per_micro_batch={SHRUNK_TOKENS_PER_MICRO_BATCH}",
            ]
        configs = {name: _load(request, side, overrides) for name, side in _sides(request).items()}
        hf_config = read_hf_config(configs["A"].model.path)
        recorded = _batch(request, configs["A"], hf_config["vocab_size"])
        replays = _run(configs, recorded)
        files = HfFiles(configs["A"].model.path)
        comparison = compare(
            replays["A"], replays["B"], {name: files.read(name).float().numpy() for name in replays["A"].gradients}
        )
    tolerance = _tolerance(configs, request.tolerance)
    disagreements = comparison.disagreements(tolerance)
    if request.as_json:
        console.print_json(json.dumps(_as_dict(configs, comparison, tolerance, disagreements)))
    else:
        _print(console, hf_config, comparison, tolerance, disagreements, shrink)
    return 1 if disagreements else 0


def _sides(request: Request) -> dict[str, list[str]]:
    return {"A": split_overrides(request.a), "B": split_overrides(request.b)}


def split_overrides(values: Sequence[str]) -> list[str]:
    """`a.b=1,c.d=2`, given once or several times, as override tokens; a comma inside a value stays.

    A bare name that the section `actor` has is that one: a layout is the actor's.
    """
    parts = [part.strip() for value in values for part in re.split(r",(?=\s*[A-Za-z_][\w.]*=)", value)]
    return [f"--{_actors(part.removeprefix('--'))}" for part in parts]


def _actors(part: str) -> str:
    return f"actor.{part}" if part.partition("=")[0] in ActorConfig.model_fields else part


def _load(request: Request, side: Sequence[str], shared: Sequence[str]) -> Config:
    """The command's own settings first, so that what the user gives wins."""
    ranks = [f"--actor.num_ranks={request.num_ranks}"] if request.num_ranks else []
    nothing_saved = ["--checkpoint.every=0", "--checkpoint.load=null", "--run.max_restarts=0"]
    return load_config(request.files, [*request.overrides, *nothing_saved, *shared, *ranks, *side])


def _require_possible(configs: dict[str, Config], hf_config: dict) -> None:
    problems = [f"layout {name}: {problem}" for name, config in configs.items() for problem in check_layout(config, hf_config)]
    paths = {str(config.model.path) for config in configs.values()}
    if len(paths) > 1:
        problems.append(f"model.path must be the same on both sides, not {' and '.join(sorted(paths))}; remove it from one.")
    for name, config in configs.items():
        num_gpus, wanted = torch.cuda.device_count(), config.actor.world_size
        if config.cluster.ray_address is None and 0 < num_gpus < wanted:
            problems.append(
                f"layout {name}: {wanted} ranks need a GPU each, this machine has {num_gpus}; use a smaller layout or --ranks, "
                "or hide the GPUs (CUDA_VISIBLE_DEVICES=) to compare on the CPU."
            )
    if problems:
        raise ConfigError(problems)


def _batch(request: Request, config: Config, vocab_size: int) -> RecordedBatch:
    """Recorded token ids beyond a shrunk vocabulary wrap around."""
    if request.batch is None:
        return generated_batch(vocab_size, num_updates=request.num_updates, num_samples=request.num_samples, config=config)
    recorded = read_recorded(request.batch)
    steps = tuple(
        tuple(
            replace(sample, token_ids=(sample.token_ids % vocab_size).astype(np.int32)) for sample in step[: request.num_samples]
        )
        for step in recorded.optimizer_steps[: request.num_updates]
    )
    return RecordedBatch(recorded.rollout_step, steps)


def generated_batch(vocab_size: int, *, num_updates: int, num_samples: int, config: Config) -> RecordedBatch:
    """Random tokens and advantages, seeded by run.seed, at a rollout step past the warm-up.

    Every other sample is of older weights: its old log-probs scatter around those of a random model, so that both clips act in
    the first update.
    """
    rng = np.random.default_rng(config.run.seed)

    def sample(index: int, prompt: np.ndarray) -> TrainSample:
        num_response = int(rng.integers(1, 24))
        return TrainSample(
            token_ids=np.concatenate((prompt, rng.integers(0, vocab_size, num_response, dtype=np.int32))),
            num_prompt_tokens=len(prompt),
            rollout_log_probs=np.minimum(rng.normal(-math.log(vocab_size), 0.7, num_response), 0.0).astype(np.float32),
            advantage=float(rng.normal()),
            loss_weight=float(0.5 + rng.random()),
            on_policy=index % 2 == 0,
        )

    def optimizer_step() -> tuple[TrainSample, ...]:
        prompts = [rng.integers(0, vocab_size, int(rng.integers(2, 12)), dtype=np.int32) for _ in range(num_samples)]
        return tuple(sample(index, prompts[index // SAMPLES_PER_PROMPT]) for index in range(num_samples))

    steps = tuple(optimizer_step() for _ in range(num_updates))
    return RecordedBatch(config.actor.optimizer.num_warmup_rollout_steps + 1, steps)


def _run(configs: dict[str, Config], recorded: RecordedBatch) -> dict[str, Replay]:
    """One layout after the other, each with ranks of its own. Their logs: RUN/logs/compare_layouts_A, _B."""
    from dapo_megatron.launcher.ray.backend import ray_backend
    from dapo_megatron.launcher.ray.session import ray_session

    replays = {}
    largest = max(configs.values(), key=lambda config: config.actor.world_size)
    with ray_session(largest):
        for name, config in configs.items():
            rules = train_batch_rules(config)
            batch = TrainBatch(tuple(cut_optimizer_step(samples, rules) for samples in recorded.optimizer_steps))
            with ray_backend(config, config.run.dir / "logs" / f"compare_layouts_{name}", num_engines=0) as processes:
                replays[name] = asyncio.run(processes.actor.replay(batch, recorded.rollout_step - 1))
    return replays


def _tolerance(configs: dict[str, Config], direct: float | None) -> Tolerance:
    """That of the more precise side."""
    dtypes = {config.model.dtype for config in configs.values()}
    tolerance = TOLERANCES["fp32" if "fp32" in dtypes else "bf16"]
    return tolerance if direct is None else replace(tolerance, direct=direct)


def _print(
    console: Console, hf_config: dict, comparison: Comparison, tolerance: Tolerance, disagreements: list[str], shrink: bool
) -> None:
    if shrink:
        console.print(
            f"model: a random {hf_config['model_type']} of {hf_config['num_hidden_layers']} narrow layers in place of model.path "
            "(--no-shrink: the model itself)",
            highlight=False,
            soft_wrap=True,
        )
    table = Table("update", "", "A", "B")
    for index, (a, b) in enumerate(comparison.updates):
        table.add_row(str(index + 1), "loss", f"{a.loss:.8g}", f"{b.loss:.8g}")
        table.add_row("", "trained tokens", str(a.num_loss_tokens), str(b.num_loss_tokens))
        table.add_row("", "gradient norm", f"{a.grad_norm:.8g}", f"{b.grad_norm:.8g}")
    console.print(table)
    table = Table(
        "parameter", "gradient", "weight change", title=f"Worst relative differences of {len(comparison.tensors)} parameters"
    )
    for tensor in comparison.tensors[:NUM_WORST]:
        table.add_row(tensor.name, f"{tensor.gradient:.1e}", f"{tensor.weight_change:.1e}")
    console.print(table)
    for disagreement in disagreements:
        console.print(disagreement, style="red", markup=False, highlight=False, soft_wrap=True)
    later = f"{tolerance.after_adam:.0e} after it" if math.isfinite(tolerance.after_adam) else "nothing judged after it"
    console.print(
        f"{'DISAGREE' if disagreements else 'agree'}: tolerance {tolerance.direct:.0e} for loss, norm and gradients of the first "
        f"update, {later}",
        style="bold red" if disagreements else "bold green",
        highlight=False,
        soft_wrap=True,
    )


def _as_dict(
    configs: dict[str, Config], comparison: Comparison, tolerance: Tolerance, disagreements: list[str]
) -> dict[str, object]:
    return {
        "agree": not disagreements,
        "disagreements": disagreements,
        "tolerance": _finite(asdict(tolerance)),
        "layouts": {name: config.actor.model_dump(mode="json") for name, config in configs.items()},
        "updates": [{"A": _finite(asdict(a)), "B": _finite(asdict(b))} for a, b in comparison.updates],
        "parameters": [_finite(asdict(tensor)) for tensor in comparison.tensors],
    }


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN and no infinity: null."""
    return {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()}
