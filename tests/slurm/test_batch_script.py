"""What the batch script decides, on a real cluster, with a stand-in for the run inside."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from dapo_megatron.launcher.slurm.cancel import cancel
from dapo_megatron.launcher.slurm.scheduler import find_job
from dapo_megatron.launcher.slurm.status import runs_of
from tests.slurm.cluster import Cluster
from tests.slurm.plays import Play, wait_for_file

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(180)]


def test_exit_codes_decide_whether_a_job_starts_again(slurm: Cluster, play: Play):
    limit = ("--slurm.max_restarts=2",)
    runs = {
        "finished": play("0", name="finished"),
        "bad input": play("2", name="bad_input"),
        "bad input, others killed": play("2!", "--slurm.nodes=2", "--actor.num_ranks=2", name="killed"),
        "bad node": play("87", name="bad_node"),
        "bad node left out": play(
            "87 87 0", "--slurm.exclude_bad_nodes=true", "--slurm.sbatch=[--exclude=node3]", name="left_out"
        ),
        "saved, stalled": play("85 86 0", *limit, name="saved"),
        "failing": play("1 1 1 0", *limit, name="failing"),
    }
    for run in runs.values():
        slurm.wait(run.job, "COMPLETED", "FAILED", seconds=60)
    assert {name: slurm.state(run.job) for name, run in runs.items()} == {
        "finished": "COMPLETED",
        "bad input": "FAILED",
        "bad input, others killed": "FAILED",
        "bad node": "FAILED",
        "bad node left out": "COMPLETED",
        "saved, stalled": "COMPLETED",
        "failing": "FAILED",
    }
    assert {name: len(run.attempts) for name, run in runs.items()} == {
        "finished": 1,
        "bad input": 1,
        "bad input, others killed": 1,
        "bad node": 1,
        "bad node left out": 3,
        "saved, stalled": 3,
        "failing": 3,
    }
    assert [line.split()[1] for line in runs["bad node left out"].attempts] == ["node1", "node2", "node4"]
    last = {name: run.history.splitlines()[-1].partition(": ")[2] for name, run in runs.items()}
    assert last["finished"] == "finished"
    assert last["bad input"] == "ended with 2: it would only fail again, see the lines above; not started again"
    assert last["bad input, others killed"] == last["bad input"]
    assert last["failing"] == "ended with 1; slurm.max_restarts (2) reached; not started again"
    words = [line.partition(": ")[2] for line in runs["saved, stalled"].history.splitlines()]
    assert [line for line in words if not line.startswith("on node")] == [
        "a checkpoint was saved; starting again",
        f"no progress, see {runs['saved, stalled'].folder}/stalls; starting again",
        "finished",
    ]
    log = slurm.output(runs["saved, stalled"].job)
    assert all(line in log for line in words), "attempts do not follow one another in one log"


def test_a_run_that_is_asked_to_save_goes_on_and_one_that_is_cancelled_does_not(slurm: Cluster, play: Play):
    limit = play("wait 0", name="limit")
    asked, preempted = play("wait 0", name="cancelled"), play("wait 0", "--slurm.sbatch=[--nodelist=node4]", name="preempted")
    at_once = play("wait 0", name="at_once")
    for run in (limit, asked, preempted, at_once):
        wait_for_file(slurm, run, "attempts")

    slurm.run("scancel", "--signal=USR1", "--batch", limit.job)  # what Slurm sends before the time limit
    urgent = slurm.sbatch("--partition=urgent", "--nodelist=node4", "--exclusive", "--wrap", "true")
    output = io.StringIO()
    cancel([asked.folder], now=False, console=Console(file=output, width=300))
    cancel([at_once.folder], now=True, console=Console(file=output, width=300))

    assert slurm.wait(limit.job, "COMPLETED") and len(limit.attempts) == 2
    assert "a checkpoint was saved; starting again" in limit.history
    assert slurm.state(asked.job) == "CANCELLED" and len(asked.attempts) == 1
    assert "a checkpoint was saved; cancelled" in output.getvalue()
    slurm.wait(at_once.job, "CANCELLED")
    slurm.wait(urgent, "COMPLETED")
    assert slurm.wait(preempted.job, "COMPLETED") and len(preempted.attempts) == 2
    assert "a checkpoint was saved; Slurm is ending this job itself" in preempted.history


def test_an_element_of_an_array_starts_again_alone_and_nodes_of_two_kinds_together(slurm: Cluster, play: Play):
    split = ("--cluster.placement=split", "--slurm.gpus_per_node=2", "--actor.num_ranks=2", "--slurm.rollout_partition=urgent")
    kinds = play("85 0", *split, "--slurm.rollout_nodes=1", "--slurm.rollout_gpus_per_node=1", name="kinds")
    sweep = play("85 0", name="sweep", array=("run.seed=1,2,3",))
    for index in range(3):
        slurm.wait(f"{sweep.job}_{index}", "COMPLETED")
    assert [folder.joinpath("attempts").read_text().count("\n") for folder in runs_of(str(sweep.folder))] == [2, 2, 2]
    assert {slurm.job(f"{sweep.job}_{index}")["Restarts"] for index in range(3)} == {"1"}

    slurm.wait(kinds.job, "COMPLETED")
    found = find_job(kinds.job)
    assert found is not None and len(found.nodes.split(",")) == 2 and found.ends is not None
    assert [line.split()[::2] for line in kinds.attempts] == [["0", "2"], ["1", "2"]]
    tasks = [kinds.environment(process) for process in (0, 1)]
    assert {task["SLURM_HET_SIZE"] for task in tasks} == {"2"}
    assert {task["SLURM_JOB_ID"] for task in tasks} == {kinds.job}, "tasks meet by the id of the job"
    assert [task["CUDA_VISIBLE_DEVICES"].count(",") + 1 for task in tasks] == [2, 1]
