"""Whole runs from the command line: real Ray, real megatron ranks over gloo, the embedded engine, real reward workers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.runs import rows, train

pytestmark = pytest.mark.timeout(300)  # starting the run they share counts for whoever comes first


def test_the_quick_start_learns(whole_run: Path):
    accuracy = [row["rollout/accuracy"] for row in rows(whole_run) if "rollout/accuracy" in row]
    assert accuracy[0] < 0.1
    assert sum(accuracy[-5:]) / 5 > 0.3


def test_every_step_has_one_row_with_the_promised_metrics(whole_run: Path):
    recorded = rows(whole_run)
    assert [row["rollout_step"] for row in recorded] == list(range(1, 31))
    assert [row["weights/version"] for row in recorded] == list(range(1, 31))
    promised = [
        "rollout/accuracy",
        "rollout/reward",
        "rollout/response_length_tokens",
        "rollout/truncated_fraction",
        "rollout/num_groups_kept",
        "rollout/num_groups_all_correct",
        "rollout/num_groups_all_wrong",
        "rollout/num_tokens_generated",
        "actor/loss",
        "actor/grad_norm",
        "actor/entropy_nats",
        "actor/mean_probability",
        "actor/clip_fraction_low",
        "actor/clip_fraction_high",
        "actor/log_prob_diff_max",
        "actor/learning_rate",
        "weights/version",
        "time/rollout_seconds",
        "time/train_seconds",
        "time/sync_seconds",
        "time/step_seconds",
        "throughput/tokens_per_second",
    ]
    assert not set(promised) - set(recorded[0])


def test_actor_and_engine_agree_on_every_log_prob(whole_run: Path):
    assert max(row.get("actor/log_prob_diff_max", 0.0) for row in rows(whole_run)) < 1e-4


def test_the_run_folder_tells_what_ran(whole_run: Path):
    description = json.loads((whole_run / "config.json").read_text())
    assert description["config"]["actor"]["tensor_parallel_size"] == 2
    assert description["versions"]["megatron-core"] == "0.19.2"
    assert sorted(path.name for path in (whole_run / "checkpoints").iterdir()) == [
        f"step_{steps:06d}" for steps in (6, 12, 18, 24, 30)
    ]
    assert list((whole_run / "tensorboard").iterdir())


def test_a_finished_run_says_so_and_starts_nothing(folder: Path, whole_run: Path):
    done = train(folder, "--train.num_rollout_steps", "30", name="whole")
    assert done.returncode == 0 and "end of this run already" in done.stdout


def test_the_first_gradient_is_the_same_under_another_layout_and_two_engines_beside_the_ranks(folder: Path, whole_run: Path):
    done = train(
        folder,
        *("--actor.tensor_parallel_size", "1", "--actor.num_ranks", "2", "--train.num_rollout_steps", "1"),
        *("--cluster.placement", "split", "--rollout.num_engines", "2"),
        name="dp2",
    )
    assert done.returncode == 0, done.stderr
    (first,) = rows(folder / "dp2")
    assert first["actor/grad_norm"] == pytest.approx(rows(whole_run)[0]["actor/grad_norm"], rel=1e-5)
