"""Real runs in real jobs: they end, and what interrupts them leaves no trace in their metrics.

Beside them stand-ins (plays.py) for which Slurm is waited for: it takes 15 seconds to see that a node is gone, 30 to look at a time limit.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from rich.console import Console

from dapo_megatron.launcher.run_folder import read_phase
from dapo_megatron.launcher.slurm.record import JobRecords
from dapo_megatron.launcher.slurm.script import TEMPLATES
from dapo_megatron.launcher.slurm.submit import Request, submit
from tests.e2e.runs import QUICKSTART, rows, training_rows
from tests.slurm.cluster import Cluster
from tests.slurm.plays import Play, wait_for_file

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

LOCAL = ("--cluster.backend=local", "--actor.tensor_parallel_size=1")
JOB = ("--gpus-per-node=0", "--slurm.exclusive=false", "--time=60", "--metrics.tensorboard=false", "--eval.path=null")
NUM_STEPS = 60
"""Of the run that is interrupted, as soon as it makes steps, three times."""


@dataclass
class LoginNode:
    """The command line, in a folder that all nodes see."""

    slurm: Cluster
    folder: Path
    attempts: dict[str, float] = field(default_factory=dict)
    """When the attempt of a run began that was waited for last."""

    def command(self, *arguments: str | Path) -> str:
        """What it prints."""
        done = subprocess.run(
            [sys.executable, "-m", "dapo_megatron", *map(str, arguments)],
            cwd=self.folder,
            env=self.slurm.environment | {"HOME": str(self.folder)},
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def submit(self, name: str, *overrides: str) -> str:
        """The quick start in a run folder of that name, without the checks that take seconds; the job's id."""
        request = Request([QUICKSTART], [f"--run.dir={self.folder / name}", *JOB, *overrides])
        submit(request, lambda config: None, Console(file=io.StringIO()))
        submission = JobRecords(self.folder / name).newest()
        assert submission is not None
        return submission.job_id

    def wait_for_next_attempt(self, name: str, job: str, num_steps: int = 1) -> None:
        """Until an attempt that was not waited for before has made so many rollout steps."""
        file = self.folder / name / "phase.json"
        first: dict[float, int] = {}

        def is_there() -> bool:
            if not file.is_file():
                return False
            note = read_phase(file)
            begun = first.setdefault(note.attempt_started, note.rollout_step)
            return note.attempt_started != self.attempts.get(name) and note.rollout_step >= begun + num_steps

        self.slurm.wait(job, until=is_there, seconds=300)
        self.attempts[name] = read_phase(file).attempt_started

    def ends(self, name: str) -> list[str]:
        """How the attempts of a run ended."""
        words = [line.partition(": ")[2] for line in JobRecords(self.folder / name).history_file.read_text().splitlines()]
        return [line for line in words if not line.startswith("on node")]


@pytest.fixture(scope="module")
def login(slurm_cluster: Cluster) -> LoginNode:
    folder = slurm_cluster.shared / "login"
    folder.mkdir()
    return LoginNode(slurm_cluster, folder)


@pytest.fixture(autouse=True)
def on_the_login_node(login: LoginNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CONF", login.slurm.environment["SLURM_CONF"])
    monkeypatch.setenv("HOME", str(login.folder))
    monkeypatch.chdir(login.folder)


@pytest.fixture(scope="module")
def sweep(login: LoginNode) -> str:
    """Three runs as one array, submitted; the last is as long as the one that is interrupted."""
    array = ("--array", f"train.num_rollout_steps=2,3,{NUM_STEPS}")
    said = login.command(
        "submit", QUICKSTART, f"--run.dir={login.folder / 'sweep'}", *JOB, *LOCAL, "--checkpoint.every=3", *array
    )
    return said.splitlines()[-5].split()[1].rstrip(":")


def test_an_array_is_one_run_in_one_folder_each_and_a_time_limit_that_comes_too_early_is_no_end(
    slurm: Cluster, login: LoginNode, sweep: str
):
    stuck = Play(login.folder)("stuck 0", name="stuck")
    wait_for_file(slurm, stuck, "attempts")
    slurm.run("scontrol", "update", f"jobid={stuck.job}", "EndTime=now")
    for index, num_steps in enumerate((2, 3, NUM_STEPS)):
        slurm.wait(f"{sweep}_{index}", "COMPLETED", seconds=300)
        run = login.folder / "sweep" / f"num_rollout_steps={num_steps}"
        assert [row["rollout_step"] for row in rows(run)] == list(range(1, num_steps + 1))
    said = login.command("status", sweep)
    assert said.count("COMPLETED") == 3 and f"{NUM_STEPS} of {NUM_STEPS}" in said
    slurm.wait(stuck.job, "COMPLETED", seconds=90)
    assert (
        "the time limit came before a checkpoint was complete, 300 s were too few" in stuck.history and len(stuck.attempts) == 2
    )


def test_a_run_that_is_interrupted_has_the_metrics_of_one_that_is_not(slurm: Cluster, login: LoginNode, sweep: str):
    overrides = (*LOCAL, "--checkpoint.every=3", f"--train.num_rollout_steps={NUM_STEPS}")
    job = login.submit("interrupted", *overrides)

    login.wait_for_next_attempt("interrupted", job)
    slurm.run("scancel", "--signal=USR1", "--batch", job)  # as Slurm does before the time limit
    login.wait_for_next_attempt("interrupted", job)
    urgent = slurm.sbatch("--partition=urgent", f"--nodelist={slurm.job(job)['NodeList']}", "--exclusive", "--wrap", "true")
    login.wait_for_next_attempt("interrupted", job)
    said = login.command("cancel", login.folder / "interrupted")
    assert "a checkpoint was saved; cancelled" in said
    assert (slurm.state(job), slurm.state(urgent)) == ("CANCELLED", "COMPLETED")

    again = login.submit("interrupted", *overrides)
    slurm.wait(again, "COMPLETED", seconds=300)
    slurm.wait(f"{sweep}_2", "COMPLETED", seconds=300)
    whole = login.folder / "sweep" / f"num_rollout_steps={NUM_STEPS}"
    assert training_rows(login.folder / "interrupted") == training_rows(whole)
    ends = login.ends("interrupted")
    assert (ends[0], ends[-2:]) == ("a checkpoint was saved; starting again", ["a checkpoint was saved; cancelled", "finished"])
    log = login.command("logs", "--no-follow", login.folder / "interrupted")
    assert log.endswith("finished\n")


def test_a_run_that_loses_a_node_goes_on_elsewhere_and_one_on_nodes_of_two_kinds_has_the_same_metrics(
    slurm: Cluster, login: LoginNode, sweep: str
):
    """Two nodes with two ranks each; and all ranks on one, the engine on another. A checkpoint is complete when the save after it begins."""
    run = ("--actor.num_ranks=4", "--train.num_rollout_steps=6", "--checkpoint.every=1")
    lossy = login.submit("lossy", *run, "--nodes=2", "--slurm.sbatch=[--exclude=node4]")
    nodes = ("--slurm.nodes=2", "--actor.num_ranks=2")
    second_node = Play(login.folder)("wait 0", *nodes, "--slurm.sbatch=[--exclude=node3]", name="second_node")
    batch_node = Play(login.folder)("wait 0", *nodes, "--slurm.sbatch=[--exclude=node1]", name="batch_node")
    for stand_in in (second_node, batch_node):
        wait_for_file(slurm, stand_in, "up.0.1")
    login.wait_for_next_attempt("lossy", lossy, num_steps=3)
    assert slurm.job(lossy)["NodeList"] == "node[1-2]"
    slurm.power_off(2)
    kinds = ("--cluster.placement=split", "--slurm.rollout_nodes=1", "--slurm.sbatch=[--nodelist=node4]")
    whole = login.submit("whole", *run, *kinds, "--slurm.rollout_sbatch=[--nodelist=node3]", "--slurm.preflight=false")
    for job in (whole, lossy):
        slurm.wait(job, "COMPLETED", seconds=400)
    assert login.ends("whole") == ["finished"]
    assert "on node4, engines on node3" in JobRecords(login.folder / "whole").history_file.read_text()
    assert slurm.job(lossy)["NodeList"] == "node[1,3]"
    assert [row["rollout_step"] for row in rows(login.folder / "lossy")] == [1, 2, 3, 4, 5, 6]
    assert training_rows(login.folder / "lossy") == training_rows(login.folder / "whole")
    log = slurm.output(lossy)
    assert "on node[1-2]" in log and log.count("\n   1 ") == 1, "it went on from a checkpoint"
    for stand_in in (second_node, batch_node):
        slurm.wait(stand_in.job, "COMPLETED", seconds=90)
    assert second_node.attempts == ["0 node1 2", "1 node1 2"]
    assert batch_node.attempts == ["0 node2 2", "1 node3 2"]
    assert "a checkpoint was saved; Slurm is ending this job itself" in second_node.history


def test_an_error_in_the_settings_ends_the_job(slurm: Cluster, login: LoginNode, sweep: str):
    job = login.submit("broken", *LOCAL, "--slurm.sbatch=[--hold]")
    settings = JobRecords(login.folder / "broken").config_file
    settings.write_text(settings.read_text().replace('"lr"', '"rl"'))
    slurm.run("scontrol", "release", job)
    slurm.wait(job, "FAILED", seconds=300)
    assert login.ends("broken") == ["ended with 2: it would only fail again, see the lines above; not started again"]
    assert "actor.optimizer.rl is not a configuration key" in slurm.output(job)


def test_a_checkpoint_is_converted_on_a_cpu_node(slurm: Cluster, login: LoginNode, sweep: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(slurm.environment, "PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    model = login.folder / "runs" / "quickstart-assets" / "model"
    out = login.folder / "it's $(converted)"
    job = slurm.sbatch(
        "--cpus-per-task=1", "--mem=1G", TEMPLATES / "convert.sbatch", "hf-to-megatron", model, out, "--workers", "1"
    )
    slurm.wait(job, "COMPLETED", seconds=300)
    assert (out / "release" / "metadata.json").is_file()
    assert "each mapped once" in slurm.output(job)
