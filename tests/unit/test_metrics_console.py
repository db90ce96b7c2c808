"""Lines of a run as they appear without a terminal, and the summary."""

import io

import pytest
from rich.console import Console

from dapo_megatron.metrics.console import COLUMNS, HEADER_EVERY, RunConsole
from dapo_megatron.metrics.names import METRICS

ROW = {
    "time/step_seconds": 0.5,
    "rollout/reward": -0.875,
    "rollout/accuracy": 0.0625,
    "rollout/response_length_tokens": 1.9,
    "actor/entropy_nats": 2.345,
    "actor/grad_norm": 0.00123,
    "actor/clip_fraction_low": 0.001,
    "actor/clip_fraction_high": 0.02,
    "rollout/num_groups_kept": 16,
    "rollout/num_groups_all_correct": 1,
    "rollout/num_groups_all_wrong": 31,
    "throughput/tokens_per_second": 2345.6,
    "rollout/num_tokens_generated": 1000,
}


@pytest.fixture
def output() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def console(output) -> RunConsole:
    return RunConsole(50, console=Console(file=output, width=80, force_terminal=False))


def test_step_line_shows_every_column_within_80_characters(console, output):
    with console:
        console.step({"rollout_step": 12, **ROW})
    header, line = output.getvalue().splitlines()
    assert header.split() == [
        "step",
        "sec",
        "reward",
        "accuracy",
        "length",
        "entropy",
        "grad",
        "norm",
        "clip",
        "l/h",
        "%",
        "kept/drop",
        "tok/s",
    ]
    assert line.split() == ["12", "0.50", "-0.875", "0.062", "1.9", "2.345", "0.00123", "0.10/2.00", "16/32", "2346"]
    assert len(header) == len(line) <= 80


def test_lines_stay_aligned_with_large_numbers(console, output):
    large = {"time/step_seconds": 4321.9, "rollout/response_length_tokens": 16384.2, "actor/grad_norm": 1.5e-7}
    with console:
        console.step({"rollout_step": 9999, **ROW, **large})
    header, line = output.getvalue().splitlines()
    assert len(line) == len(header)


def test_what_was_not_measured_is_a_dash(console, output):
    with console:
        console.step({"rollout_step": 1})
    assert output.getvalue().splitlines()[1].split() == ["1"] + ["-"] * (len(COLUMNS) - 1)


def test_header_comes_back_every_twenty_lines(console, output):
    with console:
        for step in range(1, 2 * HEADER_EVERY + 2):
            console.step({"rollout_step": step, **ROW})
    lines = output.getvalue().splitlines()
    assert [number for number, line in enumerate(lines) if "accuracy" in line] == [0, HEADER_EVERY + 1, 2 * HEADER_EVERY + 2]


def test_summary_averages_the_last_ten_steps_and_says_where_things_lie(console, output, tmp_path):
    with console:
        for step in range(1, 13):
            console.step({**ROW, "rollout_step": step, "rollout/accuracy": 0.0 if step <= 2 else 0.5})
        console.note("stopped [early]")
    console.finish(tmp_path, tensorboard=True)
    text = output.getvalue()
    assert "stopped [early]" in text
    assert "last 10 rollout steps" in text and "0.5000" in text and "12,000" in text
    for place in (tmp_path, tmp_path / "metrics.jsonl", tmp_path / "checkpoints"):
        assert str(place) in text
    assert f"tensorboard --logdir {tmp_path / 'tensorboard'}" in text


def test_columns_read_only_known_metrics(console):
    assert set(ROW) <= set(METRICS)
    complete = {"rollout_step": 1, **ROW}
    assert all(column.text(complete) for column in COLUMNS)
