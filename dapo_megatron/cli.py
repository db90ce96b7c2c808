"""The command line. Thin: parse, load, hand over to `train`; heavy imports happen inside the commands."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from dapo_megatron.exit_codes import MEANINGS, code_of
from dapo_megatron.types import ConfigError, DapoMegatronError

_PACKAGES = ("dapo-megatron", "torch", "megatron-core", "transformers", "ray")

app = typer.Typer(
    name="dapo-megatron",
    help="DAPO reinforcement learning for language models on megatron-core ranks.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Entry point of the `dapo-megatron` command: errors of the user are sentences, errors of ours are tracebacks."""
    try:
        app()
    except DapoMegatronError as error:
        problems = error.problems if isinstance(error, ConfigError) else [str(error)]
        for problem in problems:
            typer.secho(f"error: {problem}", fg="red", err=True)
        raise SystemExit(code_of(error)) from None
    except Exception as error:  # noqa: BLE001 - a job script must tell a bug from what may pass, by the exit code
        traceback.print_exc()
        raise SystemExit(code_of(error)) from None


def _print_versions(wanted: bool) -> None:
    if wanted:
        from dapo_megatron.launcher.identity import installed_version

        for package in _PACKAGES:
            typer.echo(f"{package} {installed_version(package) or 'not installed'}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_versions, is_eager=True, help="Print package versions and exit.")
    ] = False,
) -> None:
    pass


_EXIT_CODES = "**Exit codes** " + " · ".join(f"{code:d}: {meaning}" for code, meaning in MEANINGS.items())


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, epilog=_EXIT_CODES)
def train(
    arguments: Annotated[
        list[str], typer.Argument(metavar="CONFIG [--PATH VALUE]", help="YAML files, then overrides.", show_default=False)
    ],
    check: Annotated[
        bool, typer.Option("--check", help="Report every problem that can be known without starting anything, then exit.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse what will not fit on the GPU that cluster.gpu names, instead of a warning.")
    ] = False,
    allow_changed: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-changed",
            metavar="NAME[,NAME]",
            help="Go on from a checkpoint although this changed: a config path or section, data, code, versions, canary.",
        ),
    ] = None,
) -> None:
    """Train a policy with DAPO.

    Files are merged left to right: later ones win. Overrides come last; a path may be shortened to any ending that is unique.
    Values are YAML. A run folder that holds checkpoints is resumed.

    **Examples**

    - `dapo-megatron train configs/quickstart.yaml`
    - `dapo-megatron train configs/quickstart.yaml --actor.pipeline_parallel_size 2 --seed 7`
    - `dapo-megatron train base.yaml cluster.yaml --actor.optimizer.lr=2e-6 --run.dir runs/hot`
    - `dapo-megatron train configs/quickstart.yaml --check`

    `dapo-megatron config` lists every path.
    """
    from dapo_megatron.config.load import load_config
    from dapo_megatron.train import run

    files, overrides = split_arguments(arguments)
    if allow_changed:
        overrides.append(f"--checkpoint.allow_changed=[{','.join(allow_changed)}]")
    raise typer.Exit(run(load_config(files, overrides), check_only=check, strict=strict))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def evaluate(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN|CHECKPOINT|HF_DIR [CONFIG] [--PATH VALUE]",
            help="What to evaluate, then YAML files, then overrides.",
            show_default=False,
        ),
    ],
    data: Annotated[
        str | None, typer.Option("--data", metavar="FILE", help="Problems: JSONL, parquet or a hub name. Short for --eval.path.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option("--samples", help="Responses per problem, the k of avg@k. Short for --eval.num_samples.")
    ] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", help="0 is greedy. Short for --eval.temperature.")] = None,
    top_p: Annotated[float | None, typer.Option("--top-p", help="Nucleus. Short for --eval.top_p.")] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder of the results. Default: RUN/evaluations/STEP_DATA, or evaluations/MODEL_DATA."),
    ] = None,
) -> None:
    """Measure avg@k, pass@k and maj@k of a run, a checkpoint or an HF directory.

    RUN is a run folder (its newest complete checkpoint), CHECKPOINT one of its folders `checkpoints/step_NNNNNN`: actor ranks in the
    run's layout load the weights and send them to the engines. The engines read an HF_DIR themselves. What is not given here is as in
    the run: its `eval`, `data`, `reward`, `rollout` and `actor` sections; for an HF_DIR the defaults. Files and overrides work as in
    `train`.

    **Examples**

    - `dapo-megatron evaluate runs/quickstart`: the run's own held-out problems
    - `dapo-megatron evaluate runs/hot configs/aime2024.yaml --data aime2024.jsonl`: the paper's protocol, avg@32
    - `dapo-megatron evaluate runs/hot/checkpoints/step_000100 --data test.jsonl --samples 8 --temperature 1.0 --top-p 0.7`
    - `dapo-megatron evaluate models/Qwen2.5-32B configs/aime2024.yaml --data aime2024.jsonl --out results/base`
    - `dapo-megatron evaluate runs/hot --data test.jsonl --actor.tensor_parallel_size 1 --rollout.num_engines 4`: another layout

    The folder gets `problems.jsonl` (every response with its verdict), `summary.json` and `logs/`. The same command goes on where a killed
    one stopped; with other settings it refuses and names them. Exit code 2: nothing was started, mend the input. Exit code 1: it
    failed.
    """
    import json

    from dapo_megatron.evaluate import run

    paths, overrides = split_arguments(arguments)
    if not paths:
        raise ConfigError(
            "RUN|CHECKPOINT|HF_DIR is missing: say first what to evaluate, e.g. `dapo-megatron evaluate runs/quickstart`."
        )
    source, *files = paths
    given = {"eval.path": data, "eval.num_samples": samples, "eval.temperature": temperature, "eval.top_p": top_p}
    overrides += [f"--{path}={json.dumps(value)}" for path, value in given.items() if value is not None]
    raise typer.Exit(run(source, files, overrides, out))


@app.command("compare-layouts", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def compare_layouts(
    arguments: Annotated[
        list[str], typer.Argument(metavar="CONFIG [--PATH VALUE]", help="YAML files, then overrides.", show_default=False)
    ],
    a: Annotated[
        list[str] | None, typer.Option("--a", metavar="PATH=VALUE,...", help="Overrides of side A; may be repeated.")
    ] = None,
    b: Annotated[
        list[str] | None, typer.Option("--b", metavar="PATH=VALUE,...", help="Overrides of side B; may be repeated.")
    ] = None,
    ranks: Annotated[int | None, typer.Option("--ranks", min=1, help="actor.num_ranks of both sides.")] = None,
    batch: Annotated[
        Path | None,
        typer.Option("--batch", metavar="RUN|FILE", help="Recorded with train.record_batch_of_step. Default: a random one."),
    ] = None,
    updates: Annotated[int, typer.Option("--updates", min=1, help="Optimizer steps, at most those of the recorded batch.")] = 2,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Samples per optimizer step.")] = 16,
    shrink: Annotated[
        bool | None,
        typer.Option("--shrink/--no-shrink", help="A narrow random model of the same family. Default: where there is no GPU."),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option("--tolerance", min=0, help="Relative, for gradients and the first loss. fp32: 1e-5, bf16: 5e-2."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything, every parameter included, as JSON.")] = False,
) -> None:
    """Train on one batch under two layouts, with real ranks, and say whether they agree.

    Compares loss, trained tokens and gradient norm of every optimizer step, each parameter's gradient in the first one, and how
    each parameter has changed after the last. Any setting may differ between the sides, not only the layout.

    **Examples**

    - `dapo-megatron compare-layouts run.yaml --a actor.tensor_parallel_size=2 --b actor.pipeline_parallel_size=2`
    - `dapo-megatron compare-layouts run.yaml --ranks 4 --a tensor_parallel_size=4 --b tensor_parallel_size=2,sequence_parallel=true`
    - `dapo-megatron compare-layouts run.yaml --b recompute=full --batch runs/mine`

    Exit code 1: they disagree, or a rank died and is named. Exit code 2: a layout cannot run, or the batch cannot be read.
    """
    from rich.console import Console

    from dapo_megatron.config.load import load_config
    from dapo_megatron.launcher.compare_layouts import Request, compare_layouts
    from dapo_megatron.train import prepare

    files, overrides = split_arguments(arguments)
    prepare(load_config(files, overrides))
    request = Request(
        files=files,
        overrides=overrides,
        a=a or [],
        b=b or [],
        num_ranks=ranks,
        batch=batch,
        shrink=shrink,
        num_updates=updates,
        num_samples=samples,
        tolerance=tolerance,
        as_json=as_json,
    )
    raise typer.Exit(compare_layouts(request, Console()))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def submit(
    arguments: Annotated[
        list[str], typer.Argument(metavar="CONFIG [--PATH VALUE]", help="YAML files, then overrides.", show_default=False)
    ],
    array: Annotated[
        list[str] | None,
        typer.Option("--array", metavar="PATH=VALUE,...", help="A run for each value, in a folder of its own; may be repeated."),
    ] = None,
    site: Annotated[
        Path | None,
        typer.Option("--site", metavar="FILE", help="Settings below all others. Default: ~/.config/dapo-megatron/slurm.yaml."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, print the batch script, write and submit nothing.")] = False,
    write_only: Annotated[
        bool,
        typer.Option("--write-only", help="Write script and settings into the run folder, print the command to submit them."),
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse what will not fit on the GPU that cluster.gpu names, instead of a warning.")
    ] = False,
    follow: Annotated[bool, typer.Option("--follow", help="Then show the log, as `logs` does.")] = False,
) -> None:
    """Check a run, write its batch script and hand it to Slurm.

    Everything that `train --check` finds is found here, and what the partition, the run folder and its disk cannot give. The job saves
    before its time limit, puts itself back into the queue and goes on where it was. Any setting of the section `slurm` is an option:

    `--nodes 16 --gpus-per-node 8 --time 24:00:00 --partition P --account A --qos Q --container IMAGE` and what `dapo-megatron config
    slurm` lists.

    **Examples**

    - `dapo-megatron submit run.yaml --nodes 4 --time 12:00:00`
    - `dapo-megatron submit run.yaml --write-only`: a script to change and to submit by hand
    - `dapo-megatron submit run.yaml --array actor.optimizer.lr=1e-6,2e-6,4e-6`

    Exit code 2: nothing was submitted, mend the input. Exit code 1: Slurm refused.
    """
    from rich.console import Console

    from dapo_megatron.launcher.slurm.submit import Request, submit
    from dapo_megatron.train import run

    files, overrides = split_arguments(arguments)
    request = Request(files, overrides, array or [], site, dry_run, write_only)
    folder = submit(request, lambda config: run(config, check_only=True, strict=strict), Console())
    if follow and folder is not None:
        logs(str(folder))


@app.command()
def status(
    target: Annotated[
        str | None,
        typer.Argument(metavar="RUN|JOB", help="Run folder, sweep folder or job id. Default: your runs in the queue."),
    ] = None,
) -> None:
    """Say where a submitted run stands: queue, rollout step, last metrics, restarts, logs, and why it waits."""
    from rich.console import Console

    from dapo_megatron.launcher.slurm.status import runs_in_queue, runs_of, show, status_of

    runs = runs_of(target) if target is not None else runs_in_queue()
    if not runs:
        typer.echo("No run of yours is in the queue; give the run folder of one that has ended.")
    for run_dir in runs:
        show(status_of(run_dir), Console())


@app.command()
def logs(
    target: Annotated[str, typer.Argument(metavar="RUN|JOB", help="Run folder or job id.")],
    rank: Annotated[
        int | None, typer.Option("--rank", min=0, help="Of this actor rank. Default: the job and its controller.")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow/--no-follow", help="Go on until the job ends, over its restarts.")] = True,
) -> None:
    """Show the log of a submitted run, and follow it."""
    import sys

    from dapo_megatron.launcher.slurm.logs import follow as pieces
    from dapo_megatron.launcher.slurm.logs import job_has_ended, log_file
    from dapo_megatron.launcher.slurm.status import runs_of

    run_dir, *others = runs_of(target)
    if others:
        raise ConfigError(f"{target} is a sweep; give one of its runs: {', '.join(str(run) for run in (run_dir, *others))}.")
    for piece in pieces(log_file(run_dir, rank), (lambda: job_has_ended(run_dir)) if follow else (lambda: True)):
        sys.stdout.buffer.write(piece)
        sys.stdout.buffer.flush()


@app.command()
def cancel(
    target: Annotated[str, typer.Argument(metavar="RUN|JOB", help="Run folder, sweep folder or job id.")],
    now: Annotated[bool, typer.Option("--now", help="At once, without a checkpoint.")] = False,
) -> None:
    """Ask a submitted run for a checkpoint, then end its job; it does not start again."""
    from rich.console import Console

    from dapo_megatron.launcher.slurm.cancel import cancel
    from dapo_megatron.launcher.slurm.status import runs_of

    cancel(runs_of(target), now=now, console=Console())


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def plan(
    context: typer.Context,
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="CONFIG|HF_DIR|CONFIG.JSON|RUN [--PATH VALUE]",
            help="YAML files of a run, then overrides; or a model, of which config.json alone is read; or a run folder.",
            show_default=False,
        ),
    ],
    gpus: Annotated[
        int | None, typer.Option("--gpus", min=1, help="All GPUs. Default: as many as the configuration takes.")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option("--gpu", help="a100-80, h100-80, h200, h20, b200, gb200, ... Default: cluster.gpu.")
    ] = None,
    gpu_file: Annotated[
        Path | None,
        typer.Option(
            "--gpu-file", help="GPUs of your own, in the form of dapo_megatron/layout/gpus.yaml. Default: cluster.gpu_file."
        ),
    ] = None,
    gpus_per_node: Annotated[
        int | None, typer.Option("--gpus-per-node", min=1, help="GPUs that share a host. Default: slurm.gpus_per_node, 8.")
    ] = None,
    prompts: Annotated[int | None, typer.Option("--prompts", min=1, help="Prompts a rollout step. Default: 512.")] = None,
    samples: Annotated[int | None, typer.Option("--samples", min=2, help="Samples a prompt. Default: 16.")] = None,
    updates: Annotated[int | None, typer.Option("--updates", min=1, help="Optimizer steps a rollout step. Default: 16.")] = None,
    prompt_tokens: Annotated[int | None, typer.Option("--prompt-tokens", min=1, help="Longest prompt. Default: 1024.")] = None,
    response_tokens: Annotated[
        int | None, typer.Option("--response-tokens", min=1, help="Longest response. Default: 20480.")
    ] = None,
    mean_prompt_tokens: Annotated[
        float | None, typer.Option("--mean-prompt-tokens", help="Default: a quarter of the longest.")
    ] = None,
    mean_response_tokens: Annotated[
        float | None, typer.Option("--mean-response-tokens", help="Default: a third of the longest.")
    ] = None,
    colocated: Annotated[bool, typer.Option("--colocated", help="Engines and actor take turns on the same GPUs.")] = False,
    disk_gb_per_second: Annotated[
        float, typer.Option("--disk-gb-per-second", min=0.001, help="What a node writes to where checkpoints go, in GB/s.")
    ] = 2.0,
    rollout_gpus: Annotated[
        int | None, typer.Option("--rollout-gpus", min=1, help="GPUs of their own for the engines, out of --gpus.")
    ] = None,
    everything: Annotated[
        bool,
        typer.Option("--all", help="Plan also what this version cannot run: an optimizer in host memory."),
    ] = False,
    top: Annotated[int, typer.Option("--top", min=1, help="Layouts to show.")] = 10,
    explain: Annotated[
        str | None, typer.Option("--explain", metavar="tp=4,pp=2", help="One layout, itemised, or why it is not in the plan.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything, every rejection included, as JSON.")] = False,
    html: Annotated[Path | None, typer.Option("--html", help="Write one self-contained page with figures.")] = None,
    write: Annotated[Path | None, typer.Option("--write", help="Write the best layout's settings as YAML.")] = None,
    calibrate: Annotated[
        Path | None, typer.Option("--calibrate", metavar="RUN", help="Correct times and lengths by the measured steps of a run.")
    ] = None,
) -> None:
    """Choose a parallel layout: what fits in memory, how long a step takes, what is best, and why the rest is not.

    Everything of an RL step is planned, training, log-probs, rollout with its KV cache, weight sync and host memory, without a GPU and
    without weights. Every layout that is left out has a reason.

    **Examples**

    - `dapo-megatron plan models/Qwen2.5-32B --gpus 128 --gpu h100-80`: with the paper's batch and lengths
    - `dapo-megatron plan run.yaml --gpu h200 --write layout.yaml`, then `dapo-megatron train run.yaml layout.yaml`
    - `dapo-megatron plan run.yaml --gpu h100-80 --explain tp=4,pp=2`: memory of each stage, time of each part, or what rejects it
    - `dapo-megatron plan config.json --gpus 64 --gpu b200 --rollout-gpus 16 --html plan.html`: engines on GPUs of their own
    - `dapo-megatron plan run.yaml --gpus 256 --gpu h100-80 --calibrate runs/hot`: times corrected by a run's own steps

    `dapo-megatron probe` measures the best ones. Exit code 1: no layout fits. Exit code 2: this cannot be planned, mend the input.
    """
    from dapo_megatron.plan import PlanCommand, run

    files, overrides = split_arguments(arguments)
    if colocated and rollout_gpus is not None:
        raise ConfigError(f"--colocated and --rollout-gpus ({rollout_gpus}) exclude each other; remove one.")
    command = PlanCommand(
        files=files,
        overrides=overrides,
        gpu=gpu,
        num_gpus=gpus,
        gpu_file=gpu_file,
        gpus_per_node=gpus_per_node,
        sizes={
            "num_prompts_per_step": prompts,
            "num_samples_per_prompt": samples,
            "num_updates_per_rollout": updates,
            "max_prompt_tokens": prompt_tokens,
            "max_response_tokens": response_tokens,
            "mean_prompt_tokens": mean_prompt_tokens,
            "mean_response_tokens": mean_response_tokens,
        },
        colocated=colocated,
        num_rollout_gpus=rollout_gpus,
        include_unrunnable=everything,
        top=top,
        explain=explain,
        as_json=as_json,
        html=html,
        write=write,
        calibrate=calibrate,
        disk_gb_per_second=disk_gb_per_second,
        options=[name for parameter in context.command.params for name in parameter.opts if name.startswith("--")],
    )
    raise typer.Exit(run(command))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def probe(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="CONFIG|PROBE [--PATH VALUE]",
            help="YAML files, then overrides; or the folder of a probe that --slurm submitted.",
            show_default=False,
        ),
    ],
    top: Annotated[int, typer.Option("--top", min=1, help="So many of the plan's best layouts.")] = 3,
    gpu: Annotated[str | None, typer.Option("--gpu", help="What the plan is for, e.g. h100-80. Default: cluster.gpu.")] = None,
    layout: Annotated[
        list[str] | None,
        typer.Option("--layout", metavar="PATH=VALUE,...", help="This layout in place of a plan's; may be repeated."),
    ] = None,
    batch: Annotated[
        Path | None,
        typer.Option("--batch", metavar="RUN|FILE", help="Lengths of this recorded batch. Default: those a plan expects."),
    ] = None,
    copies: Annotated[
        int | None, typer.Option("--copies", min=1, help="Data-parallel ranks to start. Default: all of the layout.")
    ] = None,
    shrink: Annotated[
        bool | None,
        typer.Option("--shrink/--no-shrink", help="A narrow random model of the same family. Default: where there is no GPU."),
    ] = None,
    slurm: Annotated[bool, typer.Option("--slurm", help="Submit an array of short runs instead, one a layout.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="With --slurm: check, print the batch script, submit nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Measure the best layouts of a plan with real ranks, and rank them by what was measured.

    A step's time grows by the same amount with each micro-batch, so optimizer steps of 4 and of 8 full micro-batches say how long any takes.
    Layouts run one after the other, each with ranks of its own, on this machine or on cluster.ray_address.

    **Examples**

    - `dapo-megatron probe run.yaml --gpu h100-80 --top 3`: the plan's best three for actor.num_ranks
    - `dapo-megatron probe run.yaml --gpu h100-80 --copies 1`: with one copy of the model each; needs fewer GPUs, leaves out reductions
    - `dapo-megatron probe run.yaml --layout tensor_parallel_size=2 --layout pipeline_parallel_size=2`: layouts of your own
    - `dapo-megatron probe run.yaml --gpu h100-80 --batch runs/mine`: with the lengths of a recorded batch
    - `dapo-megatron probe run.yaml --gpu h100-80 --slurm --nodes 2`: two rollout steps of each, as jobs; then `dapo-megatron probe
      RUN/probe` ranks them

    Exit code 1: a rank died and is named. Exit code 2: a layout cannot run here.
    """
    from dapo_megatron.config.load import load_config
    from dapo_megatron.launcher.probe import ProbeRequest, probe, recorded_lengths
    from dapo_megatron.launcher.probe_jobs import is_probe, rank_runs, submit_probe
    from dapo_megatron.launcher.probe_layouts import expected_lengths, given_layouts, planned_layouts, tokens_per_update
    from dapo_megatron.layout.report import wide_console
    from dapo_megatron.train import prepare, run

    files, overrides = split_arguments(arguments)
    if len(files) == 1 and is_probe(files[0]):
        raise typer.Exit(rank_runs(files[0], wide_console(), as_json=as_json))
    config = load_config(files, overrides)
    prepare(config)
    if slurm:
        layouts = given_layouts(layout) if layout else planned_layouts(config, gpu, top)
        submit_probe(files, overrides, layouts, lambda config: run(config, check_only=True), wide_console(), dry_run=dry_run)
        raise typer.Exit
    lengths = expected_lengths(config) if batch is None else recorded_lengths(batch)
    request = ProbeRequest(
        files=files,
        overrides=overrides,
        layouts=given_layouts(layout) if layout else planned_layouts(config, gpu, top),
        lengths=lengths,
        num_tokens_per_update=tokens_per_update(config, lengths),
        copies=copies,
        shrink=shrink,
        as_json=as_json,
    )
    raise typer.Exit(probe(request, wide_console()))


@app.command("job-node", hidden=True)
def job_node(config: Annotated[Path, typer.Argument(help="RUN/slurm/config.json, as `submit` writes it.")]) -> None:
    """One task on each node of a Slurm job; the script of `submit` starts it."""
    from dapo_megatron.launcher.slurm.node import run_node
    from dapo_megatron.train import run

    raise typer.Exit(run_node(config, run))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def preflight(
    arguments: Annotated[
        list[str], typer.Argument(metavar="CONFIG [--PATH VALUE]", help="YAML files, then overrides.", show_default=False)
    ],
) -> None:
    """Check this machine as a job checks its nodes before a run.

    The run folder, versions, GPUs and who uses them, host memory against what the run needs, /dev/shm, ports. A job of several nodes looks
    besides whether all see the run folder, at clocks, and at an all-reduce over all. Exit code 87: something is bad, and named.
    """
    from rich.console import Console

    from dapo_megatron.config.load import load_config
    from dapo_megatron.launcher.slurm.preflight import preflight_here

    files, overrides = split_arguments(arguments)
    preflight_here(load_config(files, overrides), Console())


@app.command()
def config(
    prefix: Annotated[str, typer.Argument(help="Only this section or path, e.g. `actor` or `actor.optimizer`.")] = "",
) -> None:
    """List every configuration path with type, default and meaning."""
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    from dapo_megatron.config.fields import config_fields, did_you_mean, nearest, section_paths

    fields = [field for field in config_fields() if not prefix or f"{field.path}.".startswith(f"{prefix}.")]
    if not fields:
        known = [*section_paths(), *(field.path for field in config_fields())]
        raise ConfigError(f"{prefix} is neither a section nor a path of the configuration{did_you_mean(nearest(prefix, known))}")
    console = Console()
    for field in fields:
        default = "required" if field.required else _as_yaml(field.default)
        console.print(Text.assemble((field.path, "bold"), f": {default}  ", (f"[{field.type}]", "dim")))
        console.print(Padding(Text(field.meaning), (0, 0, 0, 4)))


def split_arguments(arguments: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Files and override tokens of a command line, in any order: an override without `=` takes the token after it."""
    files: list[Path] = []
    overrides: list[str] = []
    takes_next = False
    for token in arguments:
        is_name = token.startswith("--")
        if is_name or takes_next:
            overrides.append(token)
        else:
            files.append(Path(token))
        takes_next = is_name and "=" not in token
    return files, overrides


def _as_yaml(value: Any) -> str:
    """A default as one would write it in a file."""
    import yaml

    text = yaml.safe_dump(str(value) if isinstance(value, Path) else value, default_flow_style=True, width=1000)
    return text.removesuffix("\n").removesuffix("\n...")


if __name__ == "__main__":
    main()
