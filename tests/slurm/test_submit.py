"""What submit refuses, and what it prints."""

from __future__ import annotations

import io
import json
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from dapo_megatron.launcher.slurm.cancel import cancel
from dapo_megatron.launcher.slurm.status import lines_of, runs_in_queue, runs_of, status_of
from dapo_megatron.launcher.slurm.submit import Request, plan_job, submit
from dapo_megatron.types import ConfigError, SchedulerError
from tests.slurm.cluster import Cluster
from tests.slurm.plays import STAND_IN, Play

pytestmark = pytest.mark.slurm


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (("--partition=mian",), r"slurm.partition \(mian\) is no partition of this cluster; did you mean main\?"),
        (("--partition=gpu9",), r"slurm.partition \(gpu9\) is no partition of this cluster; use main, short or urgent"),
        (
            ("--partition=short", "--time=1:00:00"),
            r"slurm.time \(1:00:00\) must be at most 0:30:00, the limit of partition short",
        ),
        (
            ("--partition=short", "--nodes=2", "--actor.num_ranks=2"),
            r"slurm.nodes \(2\) must be at most 1, the nodes of partition sho",
        ),
        (
            ("--nodes=5", "--gpus-per-node=8", "--actor.num_ranks=40"),
            r"slurm.nodes \(5\) must be at most 4, the nodes with 8 GPUs",
        ),
        (
            ("--gpus-per-node=9", "--actor.num_ranks=9"),
            r"slurm.gpus_per_node \(9\) must be at most 8: no node of partition main has",
        ),
        (
            ("--slurm.cpus_per_node=17",),
            r"slurm.cpus_per_node \(17\) must be at most 16: no node of partition main has more CPUs",
        ),
        (("--run.dir=/dev/null/run",), r"run.dir \(/dev/null/run\) cannot be written: Not a directory"),
        (("--run.dir=run%j",), r"must be one line of text without % and"),
    ],
)
def test_what_the_cluster_cannot_give_is_an_error_before_submission(play: Play, overrides: tuple[str, ...], problem: str):
    with pytest.raises(ConfigError, match=problem):
        play("0", *overrides)


def test_a_run_has_one_job_at_a_time(slurm: Cluster, play: Play, shared_dir: Path):
    run = play("wait", "--slurm.sbatch=[--begin=now+1hour]")
    again = [f"--run.dir={run.folder}", "--model.path=m", "--data.path=d", "--checkpoint.every=0", "--gpus-per-node=0"]
    with pytest.raises(ConfigError, match=rf"has job {run.job}, which is PENDING; cancel it first"):
        plan_job(Request([], again), lambda config: None)


def test_submit_says_how_to_go_on(play: Play):
    run = play("0", "--time=30")
    assert run.said.splitlines() == [
        f"job {run.job}: 1 node, at most 30",
        f"run folder {run.folder}",
        *(f"  dapo-megatron {command} {run.folder}" for command in ("status", "logs", "cancel")),
    ]


def test_a_disk_without_room_for_the_checkpoints_is_an_error(play: Play, monkeypatch: pytest.MonkeyPatch):
    config = {
        "model_type": "llama",
        "num_hidden_layers": 2,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 8,
    }
    Path("model").mkdir()
    (Path("model") / "config.json").write_text(
        json.dumps(config | {"vocab_size": 1000, "max_position_embeddings": 64, "tie_word_embeddings": True})
    )
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=2**30))
    with pytest.raises(ConfigError, match=r"has 1.0 GiB free, but 3 more checkpoints of 0.5 GiB come there"):
        play("0", "--checkpoint.every=10")


def test_a_script_can_be_submitted_by_hand(slurm: Cluster, play: Play, shared_dir: Path):
    run_dir = shared_dir / "own run"
    given = [f"--run.dir={run_dir}", "--model.path=m", "--data.path=d", "--checkpoint.every=0", "--gpus-per-node=0"]
    output = io.StringIO()
    request = Request([], [*given, "--slurm.exclusive=false", f"--slurm.python={STAND_IN}"], write_only=True)
    assert submit(request, lambda config: None, Console(file=output, width=400)) is None
    (run_dir / "play").write_text("0")
    job = slurm.run(*shlex.split(output.getvalue())).stdout.split()[-1]
    slurm.wait(job, "COMPLETED")
    assert runs_of(job) == [run_dir]
    lines = dict(lines_of(status_of(run_dir)))
    assert (lines["job"], Path(lines["log"]).read_text().splitlines()[-1]) == (f"{job} COMPLETED", lines["history"])


def test_what_slurm_itself_refuses_is_said_in_its_words(play: Play):
    with pytest.raises(SchedulerError, match="sbatch: error: .*Invalid feature specification"):
        play("0", "--slurm.sbatch=[--constraint=none_such]")


def test_status_says_why_a_job_waits_and_cancel_ends_it(slurm: Cluster, play: Play):
    run = play("wait", "--slurm.sbatch=[--begin=now+1hour]")
    lines = dict(lines_of(status_of(run.folder)))
    assert lines["job"] == f"{run.job} PENDING"
    assert lines["reason"].startswith("BeginTime: ") and "; starts 20" in lines["reason"]
    assert lines["saved"] == "no checkpoint yet"
    slurm.sbatch("--begin=now+1hour", "--wrap", "true")  # none of ours
    assert runs_in_queue() == [run.folder]
    output = io.StringIO()
    cancel([run.folder], now=False, console=Console(file=output))
    assert slurm.state(run.job) == "CANCELLED"
    assert output.getvalue() == f"job {run.job} is cancelled without a further checkpoint\n"
    assert runs_in_queue() == []
    with pytest.raises(ConfigError, match="Slurm knows no job 4711"):
        runs_of("4711")
