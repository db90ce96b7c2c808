"""metrics.jsonl holds every rollout step once, whatever happens; the other sinks follow it."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from dapo_megatron.config.schema import MetricsConfig
from dapo_megatron.metrics.writers import MetricsWriter, read_metrics
from dapo_megatron.types import CheckpointError, ConfigError

FILE_ONLY = MetricsConfig(tensorboard=False)


def row(step: int, **values: float) -> dict[str, float]:
    return {"rollout_step": step, "actor/loss": step / 10, **values}


def write_steps(run_dir: Path, steps: range, config: MetricsConfig = FILE_ONLY) -> None:
    with MetricsWriter(run_dir, config) as writer:
        for step in steps:
            writer.write(row(step))


def steps_in(run_dir: Path) -> list[int]:
    return [line["rollout_step"] for line in read_metrics(run_dir / "metrics.jsonl")]


def test_each_row_is_on_disk_when_write_returns(tmp_path):
    with MetricsWriter(tmp_path, FILE_ONLY) as writer:
        writer.write(row(1, **{"rollout/num_groups_kept": 16}))
        assert (tmp_path / "metrics.jsonl").read_text() == (
            '{"rollout_step": 1, "actor/loss": 0.1, "rollout/num_groups_kept": 16}\n'
        )


def test_value_that_is_not_finite_becomes_null(tmp_path):
    with MetricsWriter(tmp_path, FILE_ONLY) as writer:
        writer.write({"rollout_step": 1, "actor/loss": float("nan"), "actor/grad_norm": float("inf"), "actor/entropy_nats": 1})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text) == {"rollout_step": 1, "actor/loss": None, "actor/grad_norm": None, "actor/entropy_nats": 1}


def test_unknown_name_is_refused_and_nothing_is_written(tmp_path):
    with MetricsWriter(tmp_path, FILE_ONLY) as writer, pytest.raises(ValueError, match="did you mean actor/loss"):
        writer.write({"rollout_step": 1, "actor/los": 1.0})
    assert steps_in(tmp_path) == []


def test_step_is_never_written_twice(tmp_path):
    write_steps(tmp_path, range(1, 4))
    with MetricsWriter(tmp_path, FILE_ONLY) as writer, pytest.raises(ValueError, match=r"rollout_step \(3\) must be above 3"):
        writer.write(row(3))
    assert steps_in(tmp_path) == [1, 2, 3]


@pytest.mark.parametrize(("kept", "expected"), [(0, []), (2, [1, 2]), (9, [1, 2, 3, 4, 5])])
def test_resume_drops_what_will_be_written_again(tmp_path, kept, expected):
    write_steps(tmp_path, range(1, 6))
    with MetricsWriter(tmp_path, FILE_ONLY) as writer:
        writer.truncate_after(kept)
        assert steps_in(tmp_path) == expected
        writer.write(row(len(expected) + 1))
    assert steps_in(tmp_path) == [*expected, len(expected) + 1]


def test_line_torn_by_a_crash_is_dropped(tmp_path):
    write_steps(tmp_path, range(1, 3))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"rollout_step": 3, "actor/lo')
    write_steps(tmp_path, range(3, 4))
    assert steps_in(tmp_path) == [1, 2, 3]


def test_damaged_line_in_the_middle_is_an_error(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"rollout_step": 1}\n{"rollout_st\n{"rollout_step": 3}\n')
    with pytest.raises(CheckpointError, match="line 2"):
        MetricsWriter(tmp_path, FILE_ONLY)


def test_tensorboard_events_hold_finite_values_under_their_step(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsWriter(tmp_path, MetricsConfig(tensorboard=True)) as writer:
        writer.write(row(1))
        writer.write(row(2, **{"actor/grad_norm": float("nan")}))
        writer.write(row(3))
        writer.truncate_after(2)
        writer.write(row(3, **{"actor/loss": 7.0}))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["actor/loss"]
    assert [(event.step, pytest.approx(event.value)) for event in events.Scalars("actor/loss")] == [(1, 0.1), (2, 0.2), (3, 7.0)]


def test_missing_wandb_is_said_before_the_run(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"metrics.wandb_project \(dapo\) needs the package wandb"):
        MetricsWriter(tmp_path, MetricsConfig(tensorboard=False, wandb_project="dapo"))


def test_resumed_run_goes_on_in_the_same_wandb_run(tmp_path, monkeypatch):
    started, logged = [], []
    run = SimpleNamespace(define_metric=lambda *_, **__: None, log=logged.append, finish=lambda: None)

    def init(**settings):
        started.append((settings["project"], settings["id"], settings["resume"]))
        return run

    fake = SimpleNamespace(init=init, util=SimpleNamespace(generate_id=lambda: f"id{len(started)}"))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = MetricsConfig(tensorboard=False, wandb_project="dapo")
    write_steps(tmp_path, range(1, 2), config)
    write_steps(tmp_path, range(2, 3), config)
    assert started == [("dapo", "id0", "allow")] * 2
    assert logged == [{"rollout_step": 1, "actor/loss": 0.1}, {"rollout_step": 2, "actor/loss": 0.2}]
