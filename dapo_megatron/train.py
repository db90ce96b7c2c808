"""A run from its config to its end: prepare, check, start the processes, hand over to the controller."""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import subprocess
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from dapo_megatron.config.checks import check_config, read_hf_config
from dapo_megatron.config.load import resolved_dict
from dapo_megatron.config.schema import Config
from dapo_megatron.data.loader import PromptStream
from dapo_megatron.data.prompts import DataReport, PromptSet, load_prompts
from dapo_megatron.exit_codes import ExitCode
from dapo_megatron.launcher.backends import RayCluster
from dapo_megatron.launcher.controller import read_state
from dapo_megatron.launcher.identity import RunIdentity, identity_of, installed_version, require_same
from dapo_megatron.launcher.imports import without_collection
from dapo_megatron.launcher.run_folder import RunFolder, num_steps_of
from dapo_megatron.launcher.stall import explain_stall, let_be_inspected
from dapo_megatron.launcher.stop import StopRequest, stop_on_signals
from dapo_megatron.metrics.console import RunConsole
from dapo_megatron.metrics.writers import MetricsWriter
from dapo_megatron.models.architecture import Architecture
from dapo_megatron.rewards.workers import RewardWorkers
from dapo_megatron.rollout.sglang_arguments import server_argument_names, sglang_is_installed
from dapo_megatron.types import CheckpointError, ConfigError, EngineError, MappingError, NumericsError, WorkerDiedError

PACKAGES = ("dapo-megatron", "torch", "megatron-core", "transformer-engine", "transformers", "ray", "sglang")
LEAVE_SECONDS = 60.0
"""After the diagnosis of a stall: how long the run may take to end its processes."""
RESTARTABLE = (WorkerDiedError, EngineError, NumericsError)

logger = logging.getLogger(__name__)


def run(config: Config, *, check_only: bool, strict: bool = False, cluster: RayCluster | None = None) -> int:
    """`dapo-megatron train`. Returns the exit code; user errors are raised as DapoMegatronError.

    `strict`: a run that will not fit on the GPU of `cluster.gpu` is such an error, not a warning. `cluster`: the Ray of a job.
    """
    let_be_inspected()
    with stop_on_signals() as stop:
        try:
            return _run(config, stop, check_only=check_only, strict=strict, cluster=cluster)
        except KeyboardInterrupt:
            if stop.reason is None:
                raise
            return _stopped(config, stop, Console())  # nothing was under way that could be lost


def _run(config: Config, stop: StopRequest, *, check_only: bool, strict: bool, cluster: RayCluster | None) -> int:
    console = Console()
    prepare(config)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # reward workers are started from this process
    prompts, held_out = check(config)
    check_fit(config, console, strict=strict)
    print_data_report(console, "data", prompts.report)
    if held_out is not None:
        print_data_report(console, "held out", held_out.report)
    folder = RunFolder(config.run.dir)
    identity = identity_of(config, prompts.fingerprint)
    start = starting_checkpoint(config, folder)
    if start is not None:
        require_same(read_state(start).identity, identity, config.checkpoint.allow_changed, start)
    if check_only:
        asyncio.run(_check_reward(config))
        console.print(f"{config.run.dir}: nothing stands against this run", highlight=False, soft_wrap=True)
        return 0
    return _train(config, prompts, held_out, identity, start, console, stop, cluster)


def _stopped(config: Config, stop: StopRequest, console: Console) -> int:
    newest = RunFolder(config.run.dir).newest_checkpoint()
    console.print(
        f"stopped by {stop.reason}; the same command goes on from {newest or 'the beginning'}", highlight=False, soft_wrap=True
    )
    return ExitCode.STOPPED


def prepare(config: Config) -> None:
    """Make what `run.prepare` makes; nothing without it."""
    if config.run.prepare:
        _import(config.run.prepare)(config)


def print_data_report(console: Console, name: str, report: DataReport) -> None:
    """What became of the rows of a data source."""
    num_prompts = report.num_rows - report.num_duplicates - report.num_too_long - report.num_malformed
    console.print(
        f"{name}: {num_prompts} prompts of {report.num_rows} rows ({report.num_duplicates} duplicates, "
        f"{report.num_too_long} too long, {report.num_malformed} malformed left out)",
        highlight=False,
        soft_wrap=True,
    )
    for problem in report.first_problems:
        console.print(f"  left out: {problem}", style="yellow", markup=False, highlight=False, soft_wrap=True)


def check(config: Config) -> tuple[PromptSet, PromptSet | None]:
    """Everything knowable without starting the run; raises ConfigError with all problems at once, or DataError.

    Returns the training prompts and the held-out ones.
    """
    hf_config = read_hf_config(config.model.path) if (config.model.path / "config.json").is_file() else None
    problems = check_config(
        config,
        hf_config,
        _megatron_extra_names() if config.actor.megatron_extra else None,
        server_argument_names() if config.rollout.sglang_extra and sglang_is_installed() else None,
    )
    problems += needs_sglang(config)
    if hf_config is not None and not problems:
        problems += model_problem(config, hf_config)
    if problems:
        raise ConfigError(problems)
    tokenizer = load_tokenizer(config.model.path)
    held_out = load_prompts(config.eval_data, tokenizer) if config.eval_data else None
    return load_prompts(config.data, tokenizer), held_out


def model_problem(config: Config, hf_config: Mapping[str, Any]) -> list[str]:
    """A sentence when megatron-core would compute something else than the model was trained as."""
    try:
        Architecture.from_hf(hf_config)
    except MappingError as error:
        return [f"{config.model.path} cannot be trained: {error}."]
    return []


def check_fit(config: Config, console: Console, *, strict: bool) -> None:
    """A warning when the planner finds that the run will not fit on the GPU of `cluster.gpu` or `gpu_file`; ConfigError with `strict`."""
    if config.cluster.gpu is None and config.cluster.gpu_file is None:
        return
    from dapo_megatron.layout.from_config import fit_problem

    problem = fit_problem(config, read_hf_config(config.model.path))
    if problem is None:
        return
    if strict:
        raise ConfigError(problem)
    console.print(f"warning: {problem}", style="yellow", markup=False, highlight=False, soft_wrap=True)


def needs_sglang(config: Config) -> list[str]:
    """A sentence when the run starts servers and the package is not there."""
    engine = config.rollout.engine
    if engine.type == "hf" or engine.engine_urls or sglang_is_installed():
        return []
    return ["rollout.engine.type sglang needs the package sglang; pip install 'dapo-megatron[sglang]'."]


def _megatron_extra_names() -> frozenset[str]:
    from dapo_megatron.actor import cpu_adapter

    cpu_adapter.install()  # a rank may live in this process, see cluster.backend
    from dapo_megatron.models.extra import transformer_config_fields

    return transformer_config_fields()


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of an HF directory."""
    with without_collection():
        from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


async def _check_reward(config: Config) -> None:
    async with RewardWorkers(config.reward) as workers:
        await workers.wait_ready()


def _train(
    config: Config,
    prompts: PromptSet,
    held_out: PromptSet | None,
    identity: RunIdentity,
    start: Path | None,
    console: Console,
    stop: StopRequest,
    cluster: RayCluster | None,
) -> int:
    from dapo_megatron.launcher.backends import session

    folder = RunFolder(config.run.dir)
    if start is not None and start.parent == folder.checkpoints and _has_ended(start, config):
        console.print(
            f"{start} is the end of this run already; raise train.num_rollout_steps to go on, or use another run.dir to start again",
            highlight=False,
            soft_wrap=True,
        )
        return 0
    folder.create({"config": resolved_dict(config), "versions": versions(), "commit": commit()})
    if cluster is not None:  # of this attempt alone: the run folder does not name it
        config = config.model_copy(update={"cluster": config.cluster.model_copy(update={"ray_address": cluster.address})})
    with session(config, cluster):
        stop.arm()
        for restarts_left in range(config.run.max_restarts, -1, -1):
            try:
                ended = _train_once(config, prompts, held_out, identity, folder, start, console, stop, cluster)
                return ExitCode.DONE if ended else _stopped(config, stop, console)
            except RESTARTABLE as error:
                if not restarts_left or stop.reason is not None:
                    raise
                start = starting_checkpoint(config, folder)
                console.print(
                    f"{error}\nstarting again from {start or 'the beginning'}; {restarts_left} restarts left",
                    style="yellow",
                    markup=False,
                    highlight=False,
                    soft_wrap=True,
                )
    raise AssertionError("unreachable: the last attempt returns or raises")


def _has_ended(checkpoint: Path, config: Config) -> bool:
    return num_steps_of(checkpoint) >= config.train.num_rollout_steps and read_state(checkpoint).unreported is None


def starting_checkpoint(config: Config, folder: RunFolder) -> Path | None:
    """Where the run goes on: its own newest checkpoint, else checkpoint.load, else None (the HF weights)."""
    newest = folder.newest_checkpoint()
    broken = [path for path in folder.checkpoints.glob("step_*") if path.suffix != ".tmp"] if newest is None else []
    if broken:
        raise CheckpointError(
            f"{folder.checkpoints} has {broken[0].name} but no complete checkpoint; remove it to start from the beginning"
        )
    if newest is not None and not config.checkpoint.resume:
        raise CheckpointError(f"{newest} exists and checkpoint.resume is false; use another run.dir, or resume")
    return newest or config.checkpoint.load


def _train_once(
    config: Config,
    prompts: PromptSet,
    held_out: PromptSet | None,
    identity: RunIdentity,
    folder: RunFolder,
    start: Path | None,
    console: Console,
    stop: StopRequest,
    cluster: RayCluster | None,
) -> bool:
    """False: told to stop before the end."""
    from dapo_megatron.eval.measure import Protocol, held_out_metrics
    from dapo_megatron.launcher.backends import backend, connections
    from dapo_megatron.launcher.controller import Controller

    state = read_state(start) if start else None
    done = state.num_steps if state else 0
    seed, shuffle = config.run.seed, config.data.shuffle
    if state:  # what may have changed was compared before
        stream = PromptStream.restore(prompts, seed, shuffle, state.prompts, allow_changed=True)
    else:
        stream = PromptStream(prompts, seed, shuffle)
    console.print(
        f"starting {config.actor.world_size} actor ranks and {config.rollout.num_engines} engines",
        highlight=False,
        soft_wrap=True,
    )
    with (
        MetricsWriter(folder.path, config.metrics) as writer,
        RunConsole(config.train.num_rollout_steps, num_steps_done=done, console=console) as screen,
        backend(config, folder.logs, cluster=cluster) as processes,
    ):
        writer.truncate_after(done - 1 if state and state.unreported is not None else done)

        def report(row: Any) -> None:
            writer.write(row)
            screen.step(row)

        def diagnose(words: str) -> str:
            summary = explain_stall(folder.path / "stalls", words, processes.places, processes.dump_elsewhere)

            def leave() -> None:
                console.print(f"{words}. {summary}", style="red", markup=False, highlight=False, soft_wrap=True)
                os._exit(ExitCode.STALLED)

            end = threading.Timer(LEAVE_SECONDS, leave)  # what is stuck may not let the rest end
            end.daemon = True
            end.start()
            return summary

        async def drive() -> bool:
            async with RewardWorkers(config.reward) as scorer, connections(processes.engines):
                await scorer.wait_ready()
                rules = sampler_rules(config)
                sampler = sampler_type(config)(processes.engines, scorer, stream, rules, state.sampler if state else None)
                protocol = Protocol.of(config, rules.params.stop_token_ids)
                evaluate = partial(held_out_metrics, processes.engines, scorer, held_out.prompts, protocol) if held_out else None
                controller = Controller(
                    config,
                    actor=processes.actor,
                    engines=processes.engines,
                    sampler=sampler,
                    prompts=stream,
                    folder=folder,
                    report=report,
                    identity=identity,
                    evaluate=evaluate,
                    state=state,
                    stop=stop,
                    diagnose=diagnose,
                )
                return await controller.run(start)

        ended = asyncio.run(drive())
        if ended:
            screen.finish(folder.path, tensorboard=config.metrics.tensorboard)
        return ended


def sampler_type(config: Config) -> Any:
    """The class behind `rollout.sampler`."""
    if config.rollout.sampler == "streaming":
        from dapo_megatron.rollout.streaming_sampler import StreamingSampler

        return StreamingSampler
    from dapo_megatron.rollout.wave_sampler import WaveSampler

    return WaveSampler


def sampler_rules(config: Config) -> Any:
    """The part of the config that decides how a step is sampled."""
    from dapo_megatron.rollout.engine import SamplingParams
    from dapo_megatron.rollout.sampler import SamplerRules

    return SamplerRules(
        num_samples_per_prompt=config.train.num_samples_per_prompt,
        params=SamplingParams(
            temperature=config.rollout.temperature,
            top_p=config.rollout.top_p,
            top_k=config.rollout.top_k,
            max_response_tokens=config.rollout.max_response_tokens,
            stop_token_ids=stop_token_ids(config.model.path),
        ),
        seed=config.run.seed,
        dynamic_sampling=config.algo.dynamic_sampling,
        accuracy_min=config.algo.accuracy_min,
        accuracy_max=config.algo.accuracy_max,
        max_over_sampling=config.rollout.max_over_sampling,
        on_limit=config.rollout.on_limit,
        max_staleness=config.rollout.max_staleness,
        lag=config.train.rollout_lag,
        in_flight_margin=config.rollout.in_flight_margin,
        partial_rollout=config.rollout.partial_rollout,
    )


def stop_token_ids(model: Path) -> tuple[int, ...]:
    """End-of-sequence ids of the model's generation config and of its tokenizer."""
    from transformers import GenerationConfig

    ids = {load_tokenizer(model).eos_token_id}
    if (model / "generation_config.json").is_file():
        configured = GenerationConfig.from_pretrained(model).eos_token_id
        ids.update(configured if isinstance(configured, list) else [configured])
    ids.discard(None)
    if not ids:
        raise ConfigError(
            f"{model} names no end-of-sequence token; set eos_token in tokenizer_config.json or generation_config.json"
        )
    return tuple(sorted(ids))


def _import(path: str) -> Callable[[Config], None]:
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"run.prepare ({path}) must be an importable `module:function`: {error}") from error


def versions() -> dict[str, str | None]:
    """Of the packages that results depend on; None: not installed."""
    return {package: installed_version(package) for package in PACKAGES}


def commit() -> str | None:
    """The commit of a source checkout; None for an installed package."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    done = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None
