"""Which layouts a probe tries: the best of a plan for the run, or those given by hand."""

from __future__ import annotations

from collections.abc import Sequence

from dapo_megatron.config.checks import read_hf_config
from dapo_megatron.config.schema import Config
from dapo_megatron.launcher.compare_layouts import split_overrides
from dapo_megatron.launcher.probe import PlannedLayout
from dapo_megatron.launcher.probe_batch import ProbeLengths
from dapo_megatron.layout.from_config import gpu_of, request_of, workload_of
from dapo_megatron.layout.plan import Candidate
from dapo_megatron.layout.report import best_of_cuts, describe
from dapo_megatron.layout.report_yaml import actor_overrides
from dapo_megatron.layout.search import plan
from dapo_megatron.types import ConfigError


def given_layouts(values: Sequence[str]) -> list[PlannedLayout]:
    """One per `--layout NAME=VALUE,...`, called as it was given."""
    return [PlannedLayout(value, split_overrides([value])) for value in values]


def planned_layouts(config: Config, gpu: str | None, top: int) -> list[PlannedLayout]:
    """The best of the `top` best cuts of the model over the ranks of this run. ConfigError without a GPU, or when none fits."""
    kind = gpu_of(config, gpu)
    if kind is None:
        raise ConfigError(
            "--gpu is missing: a plan chooses what to probe, and needs it or cluster.gpu; or name layouts yourself with --layout."
        )
    found = plan(request_of(config, read_hf_config(config.model.path), kind))
    layouts = [_planned(candidate) for candidate in best_of_cuts(found.candidates)[:top]]
    if not layouts:
        raise ConfigError(
            f"no layout of {config.model.path} fits on {found.request.num_actor_gpus} x {kind.name}; see `dapo-megatron plan`, or name "
            "layouts yourself with --layout."
        )
    return layouts


def expected_lengths(config: Config) -> ProbeLengths:
    """As the planner expects them, where no batch was recorded."""
    workload = workload_of(config)
    responses = [max(1, round(length)) for length in workload.response_lengths().tolist()]
    return ProbeLengths([max(1, round(workload.prompt_tokens))], responses, workload.num_samples_per_prompt)


def tokens_per_update(config: Config, lengths: ProbeLengths) -> float:
    """Of one optimizer step over all data-parallel ranks, at the mean of these lengths."""
    mean = sum(lengths.prompts) / len(lengths.prompts) + sum(lengths.responses) / len(lengths.responses)
    return workload_of(config).num_samples_per_update * mean


def _planned(candidate: Candidate) -> PlannedLayout:
    time = candidate.time
    return PlannedLayout(
        name=describe(candidate.layout),
        overrides=actor_overrides(candidate.layout),
        planned_seconds=time.phase_seconds("train") + time.phase_seconds("log_probs"),
    )
