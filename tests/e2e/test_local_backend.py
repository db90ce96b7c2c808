"""The same loop with everything in one process: no Ray, one real megatron rank, the embedded engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.runs import QUICKSTART_MOE, rows, run, train, training_rows

pytestmark = pytest.mark.timeout(300)  # starting the run they share counts for whoever comes first
LOCAL = ("--cluster.backend", "local", "--actor.tensor_parallel_size", "1")


@pytest.fixture(scope="module")
def local_run(folder: Path, whole_run: Path) -> Path:
    """Six steps, three of them after the process was started again."""
    for num_steps in ("3", "6"):
        done = train(folder, *LOCAL, "--train.num_rollout_steps", num_steps, "--checkpoint.every", "3", name="local")
        assert done.returncode == 0, done.stderr
    return folder / "local"


def test_one_process_trains_as_ranks_and_engines_of_their_own_do(local_run: Path, whole_run: Path):
    here, there = rows(local_run), rows(whole_run)[:6]
    assert [row["rollout_step"] for row in here] == [1, 2, 3, 4, 5, 6]
    assert here[0]["actor/grad_norm"] == pytest.approx(there[0]["actor/grad_norm"], rel=1e-5)
    # Later steps may draw another token where two layouts round differently; their gradients still have one size.
    assert [row["actor/grad_norm"] for row in here] == pytest.approx([row["actor/grad_norm"] for row in there], rel=0.5)
    assert not (local_run / "logs").exists() or not list((local_run / "logs").iterdir())


def test_a_run_whose_memory_is_given_up_while_the_engine_generates_has_the_same_metrics(folder: Path, local_run: Path):
    done = train(folder, *LOCAL, "--train.num_rollout_steps", "3", "--actor.offload", "true", name="offloaded")
    assert done.returncode == 0, done.stderr
    offloaded = training_rows(folder / "offloaded")
    assert all(row.pop("actor/offload_bytes") > 0 and row.pop("actor/offload_seconds") > 0 for row in offloaded)
    assert offloaded == training_rows(local_run)[:3]


def test_an_evaluation_in_one_process_finds_what_the_run_found(folder: Path, local_run: Path):
    done = run(folder, "evaluate", str(local_run), "--cluster.backend", "local", seconds=200)
    assert done.returncode == 0, done.stderr
    assert f"{rows(local_run)[-1]['eval/accuracy']:.3f}" in done.stdout


def test_a_mixture_of_experts_is_trained_and_goes_on_from_its_checkpoint(folder: Path):
    """Experts come from the actor as single tensors, and into the engine's stacked ones."""
    for num_steps in ("2", "3"):
        layout = ("--cluster.backend", "local", "--actor.num_ranks", "1", "--actor.expert_parallel_size", "1")
        steps = ("--train.num_rollout_steps", num_steps, "--checkpoint.every", "2", "--eval.path", "null")
        done = run(folder, "train", str(QUICKSTART_MOE), "--run.dir", str(folder / "experts"), *layout, *steps)
        assert done.returncode == 0, done.stderr
    steps = rows(folder / "experts")
    assert [row["weights/version"] for row in steps] == [1, 2, 3]
    assert all(row["actor/grad_norm"] > 0 for row in steps)
    assert max(row["actor/log_prob_diff_max"] for row in steps) < 1e-4
