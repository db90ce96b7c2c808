"""An evaluation from the command line to its summary: find the weights, check, start the processes, measure what is missing."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from dapo_megatron.config.checks import check_evaluation, read_hf_config
from dapo_megatron.config.load import load_config, resolved_dict
from dapo_megatron.config.schema import Config
from dapo_megatron.data.prompts import PromptSet, load_prompts
from dapo_megatron.eval.console import EvaluationProgress, print_summary
from dapo_megatron.eval.folder import PROBLEMS, EvaluationFolder
from dapo_megatron.eval.records import ProblemRecord
from dapo_megatron.eval.summary import summarize
from dapo_megatron.launcher.policy_source import PolicySource, find_policy
from dapo_megatron.rewards.workers import RewardWorkers
from dapo_megatron.train import commit, load_tokenizer, needs_sglang, prepare, print_data_report, stop_token_ids, versions
from dapo_megatron.types import ConfigError, DataError, Prompt

if TYPE_CHECKING:
    from dapo_megatron.eval.measure import Protocol
    from dapo_megatron.launcher.local_backend import LocalBackend
    from dapo_megatron.launcher.ray.backend import RayBackend


def run(path: Path, files: Sequence[Path], overrides: Sequence[str], out: Path | None) -> int:
    """`dapo-megatron evaluate`. Returns the exit code; user errors are raised as DapoMegatronError."""
    console = Console()
    source = find_policy(path)
    config = evaluation_config(source, files, overrides)
    prepare(config)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # reward workers are started from this process
    problems = check(source, config)
    print_data_report(console, "data", problems.report)

    from dapo_megatron.eval.measure import Protocol

    protocol = Protocol.of(config, stop_token_ids(config.model.path))
    assert config.eval.path is not None
    out = out or source.default_out(config.eval.path)
    about = {
        "source": str(source.path),
        "data": config.eval.path,
        "config": resolved_dict(config),
        "versions": versions(),
        "commit": commit(),
    }
    with EvaluationFolder(out, settings_of(source, config, problems, protocol), about) as folder:
        missing = {number: prompt for number, prompt in enumerate(problems.prompts) if number not in folder.num_correct}
        params, num_done = protocol.params, len(folder.num_correct)
        _print(
            console,
            f"{source.path} (weights of version {source.weight_version}): {len(problems.prompts)} problems x {protocol.num_samples} "
            f"samples, temperature {params.temperature:g}, top-p {params.top_p:g}, at most {params.max_response_tokens} tokens"
            + (f"; {num_done} problems are done" if num_done else ""),
        )
        if missing:
            _Measurement(source, config, protocol, missing, folder, console).run()
        summary = summarize(folder.records())
        places = {"summary": folder.write_summary(summary.to_dict()), "responses": out / PROBLEMS}
        print_summary(summary, f"{source.path} on {config.eval.path}: {summary.num_problems} problems", places, console)
    return 0


def evaluation_config(source: PolicySource, files: Sequence[Path], overrides: Sequence[str]) -> Config:
    """The run's own settings (or the defaults, for an HF directory), then files, then overrides. Raises ConfigError."""
    base = source.base_config()
    if source.run is None:
        return load_config(files, [*overrides, f"--model.path={json.dumps(str(source.path))}"], base=base)
    try:
        load_config([], base=base)
    except ConfigError as error:  # written by another version
        raise ConfigError([f"{source.run.config_file}: {problem}" for problem in error.problems]) from None
    return load_config(files, overrides, base=base)


def check(source: PolicySource, config: Config) -> PromptSet:
    """The problems; raises ConfigError with every fault that can be known before a process is started, or DataError."""
    hf_config = read_hf_config(config.model.path) if (config.model.path / "config.json").is_file() else None
    faults = check_evaluation(config, hf_config, starts_actor=source.run is not None) + needs_sglang(config)
    if faults:
        raise ConfigError(faults)
    data = config.eval_data
    assert data is not None
    problems = load_prompts(data, load_tokenizer(config.model.path))
    if problems.report.num_too_long:
        raise DataError(
            f"{problems.report.num_too_long} of {problems.report.num_rows} problems of {data.path} have more prompt tokens than "
            f"data.max_prompt_tokens ({data.max_prompt_tokens}), and an evaluation leaves none out; raise it with "
            "--data.max_prompt_tokens."
        )
    return problems


def settings_of(source: PolicySource, config: Config, problems: PromptSet, protocol: Protocol) -> dict[str, Any]:
    """Everything that the responses and verdicts depend on, by the name under which a person can change it."""
    reward = config.reward
    return {
        "weights": source.fingerprint(),
        "weight_version": source.weight_version,
        "problems (prompts and answers of --data)": problems.fingerprint,
        "eval.num_samples": protocol.num_samples,
        "eval.temperature": protocol.params.temperature,
        "eval.top_p": protocol.params.top_p,
        "eval.max_response_tokens": protocol.params.max_response_tokens,
        "eval.sampling_seed": protocol.seed,
        "stop tokens of model.path": protocol.params.stop_token_ids,
        "rollout.engine.type": config.rollout.engine.type,
        "rollout.engine.dtype": config.rollout.engine.dtype,
        "model.dtype": config.model.dtype,
        **{f"reward.{name}": value for name, value in reward.model_dump(mode="json", exclude={"num_workers"}).items()},
    }


@dataclass(frozen=True, slots=True)
class _Measurement:
    """What is left of an evaluation: `missing` problems by number."""

    source: PolicySource
    config: Config
    protocol: Protocol
    missing: Mapping[int, Prompt]
    folder: EvaluationFolder
    console: Console

    def run(self) -> None:
        """Start the processes, measure, stop them. Whatever ends it early, the problems so far are kept."""
        from dapo_megatron.launcher.backends import backend, session

        config, num_problems = self.config, len(self.missing) + len(self.folder.num_correct)
        ranks = f"{config.actor.world_size} actor ranks and " if self.source.run else ""
        _print(self.console, f"starting {ranks}{config.rollout.num_engines} engines")
        try:
            with closing(RewardWorkers(config.reward)) as scorer:
                asyncio.run(scorer.wait_ready())  # a wrong reward.function ends it before anything else is started
                with (
                    session(config),
                    EvaluationProgress(
                        num_problems, self.protocol.num_samples, self.folder.num_correct, self.console
                    ) as progress,
                    backend(config, self.folder.logs, "frozen" if self.source.run else "none") as processes,
                ):
                    asyncio.run(self._drive(processes, scorer, progress))
        except BaseException:
            done = len(self.folder.num_correct)
            _print(
                self.console,
                f"{done} of {num_problems} problems are kept in {self.folder.path}; the same command goes on from there.",
                style="yellow",
            )
            raise

    async def _drive(self, processes: RayBackend | LocalBackend, scorer: RewardWorkers, progress: EvaluationProgress) -> None:
        from dapo_megatron.launcher.backends import connections

        async with connections(processes.engines):
            await self._measure(processes, scorer, progress)

    async def _measure(self, processes: RayBackend | LocalBackend, scorer: RewardWorkers, progress: EvaluationProgress) -> None:
        from dapo_megatron.eval.measure import measure
        from dapo_megatron.launcher.controller import sync_weights
        from dapo_megatron.launcher.phase_clock import Deadlines, PhaseClock

        source, deadline = self.source, self.config.cluster.unlearnt_deadline_seconds
        if source.run is not None:
            clock = PhaseClock(Deadlines(self.config.cluster))
            await clock.run("load", processes.actor.load_weights(source.actor_directory(), source.weight_digests()))
            await clock.run("sync", sync_weights(processes.actor, processes.engines, source.weight_version))
            processes.actor.stop()

        def take(record: ProblemRecord) -> None:
            self.folder.add(record)
            progress.add(record)

        progress.generating()
        await measure(processes.engines, scorer, self.missing, self.protocol, take, stall_seconds=deadline)


def _print(console: Console, text: str, style: str | None = None) -> None:
    console.print(text, style=style, highlight=False, soft_wrap=True, markup=False)
