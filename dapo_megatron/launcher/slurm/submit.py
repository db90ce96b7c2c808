"""`dapo-megatron submit`: check everything here, write the script and the settings into the run folder, hand them to Slurm."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from dapo_megatron.config.load import load_config, resolved_dict
from dapo_megatron.config.schema import Config
from dapo_megatron.config.slurm_text import seconds_of
from dapo_megatron.launcher.slurm import scheduler
from dapo_megatron.launcher.slurm.lead import signal_lead_seconds
from dapo_megatron.launcher.slurm.limits import device_problems, folder_problems, partition_problems, space_problems
from dapo_megatron.launcher.slurm.record import JobRecords
from dapo_megatron.launcher.slurm.script import SCRIPT, render, this_python
from dapo_megatron.launcher.slurm.sweep import Element, elements_of
from dapo_megatron.metrics.writers import FILE_NAME as METRICS_FILE_NAME
from dapo_megatron.types import ConfigError, SchedulerError

SITE_FILE = Path("~/.config/dapo-megatron/slurm.yaml")
"""A config file that is read before the others: what all jobs of a user or a site have in common."""


@dataclass(frozen=True, slots=True)
class Request:
    """The command line of `submit`."""

    files: Sequence[Path]
    overrides: Sequence[str]
    arrays: Sequence[str] = ()
    site: Path | None = None
    """None: SITE_FILE, where there is one."""
    dry_run: bool = False
    """Print the script alone."""
    write_only: bool = False
    """Write what the job reads, and print the command that submits it."""
    elements: Sequence[Element] = ()
    """The runs of an array as they are, in place of `arrays`."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A job to be submitted: one run, or one for each element of an array."""

    folder: Path
    """The run's, or the sweep's: absolute."""
    names: tuple[str, ...]
    """Folders of the runs below it; empty for a single run."""
    configs: tuple[Config, ...]
    script: str

    @property
    def run_dirs(self) -> tuple[Path, ...]:
        """In the order of `configs`."""
        return tuple(config.run.dir for config in self.configs)


def submit(request: Request, check: Callable[[Config], object], console: Console) -> Path | None:
    """Submit, and say how to go on; the folder of the run or the sweep. None when nothing was submitted.

    `check` raises what stands against a config. Raises ConfigError with all other problems at once, SchedulerError when Slurm refuses.
    """
    with redirect_stdout(sys.stderr):  # a dry run's script is all there is on stdout
        plan = plan_job(request, check)
    if request.dry_run:
        print(plan.script, end="")
        return None
    _write(plan)
    if request.write_only:
        words = ("sbatch", f"--chdir={plan.folder}", str(plan.folder / SCRIPT))
        _print(console, [shlex.join(words)])
        return None
    _say(console, plan, _hand_in(plan))
    return plan.folder


def plan_job(request: Request, check: Callable[[Config], object]) -> Plan:
    """Everything up to the submission; a dry run needs no Slurm and writes nothing."""
    site = (request.site or SITE_FILE).expanduser()
    files = [site, *request.files] if request.site is not None or site.is_file() else list(request.files)
    base = load_config(files, request.overrides)
    folder = base.run.dir.absolute()
    elements = tuple(request.elements) or elements_of(request.arrays)
    configs = [
        load_config(files, [*request.overrides, *element.overrides, f"--run.dir={json.dumps(str(folder / element.name))}"])
        for element in elements or (Element("", ()),)
    ]
    problems = _problems(base, configs, dry_run=request.dry_run)
    if elements and base.slurm.rollout_nodes:
        problems.append(
            "--array and slurm.rollout_nodes exclude each other: Slurm has no arrays of heterogeneous jobs; submit each."
        )
    if any(config.slurm != base.slurm for config in configs):
        problems.append("--array cannot change the section slurm: an array is one script; submit each.")
    if problems:
        raise ConfigError(problems)
    for config in configs:
        check(config)
    if not request.dry_run and (problems := [problem for config in configs for problem in space_problems(config)]):
        raise ConfigError(problems)
    lead = max(signal_lead_seconds(config, config.run.dir / METRICS_FILE_NAME) for config in configs)
    limit = seconds_of(configs[0].slurm.time)
    if limit is not None and lead >= limit:
        raise ConfigError(
            f"slurm.signal_lead_seconds ({lead}) must be less than slurm.time ({configs[0].slurm.time}); use a longer time limit."
        )
    names = tuple(element.name for element in elements)
    try:
        script = render(
            configs[0], run_dir=folder, working_dir=Path.cwd(), elements=names, signal_lead_seconds=lead, python=this_python()
        )
    except ValueError as error:
        raise ConfigError(f"the batch script cannot hold a value: {error}.") from None
    return Plan(folder, names, tuple(configs), script)


def _problems(base: Config, configs: Sequence[Config], *, dry_run: bool) -> list[str]:
    problems = [problem for config in configs for problem in device_problems(config)]
    try:
        problems += partition_problems(base, scheduler.partitions())
        problems += [problem for config in configs for problem in _jobs_under_way(config)]
    except SchedulerError as error:
        if not dry_run:
            raise
        print(f"not compared with what the cluster has: {error}")
    if not dry_run:
        problems += [problem for config in configs for problem in folder_problems(config)]
    return list(dict.fromkeys(problems))


def _jobs_under_way(config: Config) -> list[str]:
    newest = JobRecords(config.run.dir).newest()
    job = scheduler.find_job(newest.job_id) if newest else None
    if job is None or job.ended:
        return []
    remedy = "cancel it first (dapo-megatron cancel), or use another run.dir"
    return [f"run.dir ({config.run.dir}) has job {job.job_id}, which is {job.state}; {remedy}."]


def _write(plan: Plan) -> None:
    """Everything that the job reads."""
    for config in plan.configs:
        records = JobRecords(config.run.dir)
        records.folder.mkdir(parents=True, exist_ok=True)
        records.config_file.write_text(json.dumps(resolved_dict(config), indent=2) + "\n")
    whole = JobRecords(plan.folder)
    whole.folder.mkdir(parents=True, exist_ok=True)
    whole.script_file.write_text(plan.script)
    if plan.names:
        whole.write_sweep(plan.names)


def _hand_in(plan: Plan) -> str:
    job_id = scheduler.submit(plan.folder / SCRIPT, plan.folder)
    for index, run_dir in enumerate(plan.run_dirs):
        JobRecords(run_dir).add(f"{job_id}_{index}" if plan.names else job_id)
    return job_id


def _say(console: Console, plan: Plan, job_id: str) -> None:
    slurm = plan.configs[0].slurm
    each = f"{slurm.nodes} nodes" if slurm.nodes > 1 else "1 node"
    each += f" x {slurm.gpus_per_node} GPUs" if slurm.gpus_per_node else ""
    each += f", {slurm.rollout_nodes} for the engines" if slurm.rollout_nodes else ""
    runs = f"{len(plan.names)} runs, each on " if plan.names else ""
    lines = [
        f"job {job_id}: {runs}{each}, at most {slurm.time}",
        f"run folder {plan.folder}",
        *(f"  dapo-megatron {command} {shlex.quote(str(plan.folder))}" for command in ("status", "logs", "cancel")),
    ]
    _print(console, lines)


def _print(console: Console, lines: Sequence[str]) -> None:
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
