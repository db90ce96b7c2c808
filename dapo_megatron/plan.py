"""`dapo-megatron plan`: what is planned, from the command line; the answer as a table, a page, JSON or a file of settings."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from dapo_megatron.config.checks import read_hf_config
from dapo_megatron.config.fields import did_you_mean, nearest
from dapo_megatron.config.load import load_config
from dapo_megatron.config.schema import Config
from dapo_megatron.layout.calibration import calibrated, calibration_of
from dapo_megatron.layout.explain import cut_matching, matching, parse_sizes
from dapo_megatron.layout.from_config import dtypes_of, gpu_of, layout_of, num_rollout_gpus, workload_of
from dapo_megatron.layout.from_config import request_of as config_request
from dapo_megatron.layout.hardware import Gpu, known_gpus, read_gpus
from dapo_megatron.layout.model_shape import ModelShape
from dapo_megatron.layout.plan import Candidate, Plan, PlanRequest
from dapo_megatron.layout.report import (
    best_of_cuts,
    gb,
    nearest_first,
    plan_console,
    print_candidate,
    print_plan,
    print_rejections,
    print_settings,
    say,
    train_peak_bytes,
)
from dapo_megatron.layout.report_yaml import settings_of, yaml_of
from dapo_megatron.layout.search import plan
from dapo_megatron.layout.space import release_problem
from dapo_megatron.layout.workload import Workload
from dapo_megatron.types import ConfigError

GPUS_PER_NODE = 8
"""Where neither the command line nor the configuration says."""
NUM_EXPLAINED = 10
"""Rejections shown for one --explain."""
_CONFIG_FILE = "config.json"
"""Of an HF directory the model's, of a run folder the run's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanCommand:
    """The command line; None: as in the configuration, or the default of the workload."""

    files: Sequence[Path]
    """A run's YAML files, or one HF directory, config.json or run folder."""
    overrides: Sequence[str]
    gpu: str | None
    num_gpus: int | None
    gpu_file: Path | None
    gpus_per_node: int | None
    sizes: Mapping[str, Any]
    """Fields of `Workload` that were given."""
    colocated: bool
    num_rollout_gpus: int | None
    include_unrunnable: bool
    top: int
    explain: str | None
    as_json: bool
    html: Path | None
    write: Path | None
    calibrate: Path | None
    disk_gb_per_second: float
    options: Sequence[str] = ()
    """Names of all options, for the one that is meant by a misspelt one."""


@dataclass(frozen=True, slots=True)
class Planned:
    """What was named on the command line: a model, and a run's configuration where there is one."""

    model_name: str
    hf_config: Mapping[str, Any]
    config: Config | None


def run(command: PlanCommand) -> int:
    """Returns the exit code: 0 when a layout fits, 1 when none does. Raises ConfigError for input that cannot be planned."""
    console = plan_console()
    wanted = None if command.explain is None else parse_sizes(command.explain)
    planned = read_planned(command.files, command.overrides, command.options)
    request = request_of(command, planned)
    found = plan(request) if wanted is None else _only(plan(request, partial(cut_matching, wanted=wanted)), wanted)
    chosen = next((candidate for candidate in found.candidates if release_problem(candidate.layout) is None), None)
    if command.as_json:
        print(json.dumps(as_dict(found, command.top), indent=2))
    elif wanted is not None:
        _explain(found, wanted, console)
    else:
        print_plan(found, command.top, console)
        if chosen is not None:
            print_settings(chosen, request, _next_command(command, planned), console)
    if command.html is not None:
        from dapo_megatron.layout.report_html import write_html

        write_html(found, command.top, command.html)
        _written(command, command.html, "open it in a browser", console)
    if command.write is not None:
        if chosen is None:
            raise ConfigError(
                f"--write {command.write} has nothing to write: no layout fits that this version can run; see the reasons."
            )
        _write(command.write, chosen, request)
        _written(command, command.write, f"settings of {chosen.layout}, to merge after a run's own files", console)
    return 0 if found.candidates else 1


def read_planned(files: Sequence[Path], overrides: Sequence[str], options: Sequence[str] = ()) -> Planned:
    """The model and the configuration behind the paths. ConfigError for what is neither; `options` are what may be meant by a typo."""
    if not files:
        raise ConfigError(
            "CONFIG, HF_DIR or config.json is missing: say first what to plan, e.g. `dapo-megatron plan configs/run.yaml`."
        )
    first, *others = files
    if first.is_dir() and not (first / _CONFIG_FILE).is_file():
        raise ConfigError(f"{first} holds no {_CONFIG_FILE}: it must be an HF directory or a run folder; give one of them.")
    if first.is_dir() or first.suffix == ".json":
        content = read_hf_config(first) if first.is_dir() else _read_json(first)
        if "model_type" in content:
            unknown = [token.partition("=")[0] for token in overrides if token.startswith("--")]
            if unknown:
                hint = did_you_mean(nearest(unknown[0], options))
                raise ConfigError(
                    f"{unknown[0]} is no option of plan, and {first} is a model: it has no settings to override{hint or '.'}"
                )
            if others:
                raise ConfigError(
                    f"{first} is a model and no file of settings, so {others[0]} cannot be merged with it; give one of them."
                )
            return Planned(str(first), content, None)
        if "config" in content:  # a run folder
            return _of_config(load_config(others, overrides, base=content["config"]))
        raise ConfigError(
            f"{first} has no model_type: it must be an HF directory, its config.json or a run folder; give one of them."
        )
    return _of_config(load_config(files, overrides))


def request_of(command: PlanCommand, planned: Planned) -> PlanRequest:
    """The question to the planner. ConfigError for devices or lengths that cannot be."""
    config = planned.config
    workload = Workload() if config is None else workload_of(config)
    workload = replace(workload, **{name: value for name, value in command.sizes.items() if value is not None})
    gpu, num_gpus = _gpu(command, config), command.num_gpus
    rollout_gpus = command.num_rollout_gpus
    if rollout_gpus is None and not command.colocated and config is not None:
        rollout_gpus = num_rollout_gpus(config)
    if num_gpus is None:
        if config is None:
            raise ConfigError("--gpus is missing: say how many GPUs there are, e.g. --gpus 64.")
        num_gpus = config.actor.world_size + (rollout_gpus or 0)
    per_node = command.gpus_per_node or (config.slurm.gpus_per_node if config else 0) or GPUS_PER_NODE
    problems = [
        *_device_problems(num_gpus, per_node, rollout_gpus),
        *_length_problems(workload, planned),
    ]
    if problems:
        raise ConfigError(problems)
    request = PlanRequest(
        model_name=planned.model_name,
        model=ModelShape.from_hf(planned.hf_config),
        workload=workload,
        gpu=gpu,
        num_gpus=num_gpus,
        num_rollout_gpus=rollout_gpus,
        gpu_file=_gpu_file(command, config),
        gpus_per_node=per_node,
        disk_gb_per_second=command.disk_gb_per_second,
        only_runnable=not command.include_unrunnable,
        top=command.top,
        **({} if config is None else dtypes_of(config)),
    )
    return request if command.calibrate is None else _calibrated(request, command.calibrate)


def as_dict(found: Plan, top: int) -> dict[str, Any]:
    """A plan as JSON types: the best layouts of each cut with their settings, every rejection."""
    return {
        "model": found.request.model_name,
        "gpu": found.request.gpu.name,
        "num_gpus": found.request.num_gpus,
        "workload": asdict(found.request.workload),
        "num_layouts": found.num_enumerated,
        "num_fitting": len(found.candidates),
        "notes": found.notes,
        "layouts": [_candidate(candidate, found.request) for candidate in best_of_cuts(found.candidates)[:top]],
        "rejections": [{**asdict(rejection), "layout": str(rejection.layout)} for rejection in found.rejections],
    }


def _candidate(candidate: Candidate, request: PlanRequest) -> dict[str, Any]:
    memory, time = candidate.memory, candidate.time
    return {
        "layout": str(candidate.layout),
        "settings": settings_of(candidate.layout, request),
        "limit": candidate.limit,
        "gains": candidate.gains,
        "step_seconds": time.step_seconds,
        "tokens_per_gpu_second": time.tokens_per_gpu_second,
        "mfu": time.mfu,
        "time": [asdict(item) for item in time.items],
        "peak_bytes": memory.peak_bytes,
        "host_bytes": memory.host_bytes,
        "kv_cache_tokens": memory.kv_cache_tokens,
        "checkpoint": asdict(memory.checkpoint),
        "stages": [asdict(stage) for stage in memory.stages],
    }


def _of_config(config: Config) -> Planned:
    return Planned(str(config.model.path), read_hf_config(config.model.path), config)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file} cannot be read ({error.strerror}); give the config.json of a model.") from None
    except ValueError as error:
        raise ConfigError(f"{file} must be JSON ({error}); copy the file again from its source.") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file} must hold a JSON object, not {type(content).__name__}; copy the file again from its source.")
    return content


def _gpu(command: PlanCommand, config: Config | None) -> Gpu:
    gpu = gpu_of(config, command.gpu, command.gpu_file)
    if gpu is None:
        own = {} if command.gpu_file is None else read_gpus(command.gpu_file)
        where = "" if config is None else " or cluster.gpu in the configuration"
        raise ConfigError(f"--gpu is missing: say which GPU, {', '.join({**known_gpus(), **own})}{where}.")
    return gpu


def _gpu_file(command: PlanCommand, config: Config | None) -> Path | None:
    return command.gpu_file or (None if config is None else config.cluster.gpu_file)


def _device_problems(num_gpus: int, per_node: int, rollout_gpus: int | None) -> list[str]:
    problems = []
    for name, count in (("--gpus", num_gpus), ("--rollout-gpus", rollout_gpus)):
        if count is not None and count > per_node and count % per_node:
            below = count // per_node * per_node
            problems.append(
                f"{name} ({count}) must be a multiple of --gpus-per-node ({per_node}), or less than one node; "
                f"use {below} or {below + per_node}."
            )
    if rollout_gpus is not None and rollout_gpus >= num_gpus:
        problems.append(f"--rollout-gpus ({rollout_gpus}) must be less than --gpus ({num_gpus}): the actor needs some; lower it.")
    return problems


def _length_problems(workload: Workload, planned: Planned) -> list[str]:
    problems = []
    positions = planned.hf_config.get("max_position_embeddings")
    longest = workload.max_prompt_tokens + workload.max_response_tokens
    if isinstance(positions, int) and longest > positions:
        problems.append(
            f"--prompt-tokens + --response-tokens ({workload.max_prompt_tokens} + {workload.max_response_tokens} = {longest}) must not "
            f"exceed max_position_embeddings ({positions}) of {planned.model_name}; shorten one of them by {longest - positions}."
        )
    for name, mean, most in (
        ("prompt-tokens", workload.mean_prompt_tokens, workload.max_prompt_tokens),
        ("response-tokens", workload.mean_response_tokens, workload.max_response_tokens),
    ):
        if mean is not None and not 0 < mean <= most:
            problems.append(f"--mean-{name} ({mean:g}) must be above 0 and at most --{name} ({most}); change one of the two.")
    return problems


def _calibrated(request: PlanRequest, run_dir: Path) -> PlanRequest:
    """With what the steps of a run say, compared with the plan of that run's own model, devices, layout and batch."""
    if not (run_dir / _CONFIG_FILE).is_file():
        raise ConfigError(f"--calibrate ({run_dir}) must be the folder of a run, and holds no {_CONFIG_FILE}; give a run.dir.")
    past = read_planned([run_dir], [])
    if past.config is None:
        raise ConfigError(f"--calibrate ({run_dir}) must be the folder of a run, not of a model; give a run.dir.")
    own = replace(
        config_request(past.config, past.hf_config, gpu_of(past.config) or request.gpu), gpus_per_node=request.gpus_per_node
    )
    return calibrated(request, calibration_of(own, layout_of(past.config), run_dir))


def _only(found: Plan, wanted: Mapping[str, str]) -> Plan:
    """The part of a plan that has these sizes. ConfigError when no layout has."""
    candidates = tuple(candidate for candidate in found.candidates if matching(candidate.layout, wanted))
    rejections = tuple(nearest_first([rejection for rejection in found.rejections if matching(rejection.layout, wanted)]))
    if not candidates and not rejections:
        raise ConfigError(
            f"--explain ({_words(wanted)}) is no layout of {found.request.num_actor_gpus} GPUs that was looked at: tp x pp x cp x dp must be "
            "their number, and tp, pp and ep divide the model; change a size, or leave one out."
        )
    return replace(found, candidates=candidates, rejections=rejections)


def _explain(found: Plan, wanted: Mapping[str, str], console: Console) -> None:
    """The best layout of these sizes, itemised, or why there is none."""
    if found.candidates:
        print_candidate(found, found.candidates[0], console)
        return
    say(console, f"No layout with {_words(wanted)} is in the plan:", style="bold")
    print_rejections(found.rejections[:NUM_EXPLAINED], console)
    if len(found.rejections) > NUM_EXPLAINED:
        say(console, f"and {len(found.rejections) - NUM_EXPLAINED} more; --json has them all")


def _words(wanted: Mapping[str, str]) -> str:
    return ",".join(f"{name}={value}" for name, value in wanted.items())


def _write(file: Path, best: Candidate, request: PlanRequest) -> None:
    comments = (
        f"{best.layout} for {request.model_name} on {request.num_gpus} x {request.gpu.name}, by dapo-megatron plan:",
        f"{best.time.step_seconds:.0f} s a rollout step, {gb(train_peak_bytes(best))} GB on the fullest GPU in training.",
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml_of(best.layout, request, comments), encoding="utf-8")


def _next_command(command: PlanCommand, planned: Planned) -> str:
    """What starts the run with the layout."""
    named = planned.config is not None and not command.files[0].is_dir()  # a run folder is no file to merge with
    files = [str(file) for file in command.files] if named else ["CONFIG.yaml"]
    return shlex.join(["dapo-megatron", "submit", *files, str(command.write or "layout.yaml"), *command.overrides])


def _written(command: PlanCommand, file: Path, what_for: str, console: Console) -> None:
    if not command.as_json:
        size = math.ceil(file.stat().st_size / 1e6)
        say(console, f"{file}: {what_for}" + (f" ({size} MB)" if size > 1 else ""))
