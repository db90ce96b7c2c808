"""Times and texts of the section `slurm`."""

from __future__ import annotations

from pathlib import Path

import pytest

from dapo_megatron.config.load import load_config
from dapo_megatron.config.slurm_text import seconds_of
from dapo_megatron.types import ConfigError

REQUIRED = ("--model.path", "m", "--data.path", "d")


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        (30, 1800),
        ("30", 1800),
        ("1:30", 90),
        ("24:00:00", 86400),
        ("2-12", 216000),
        ("1-0:30", 88200),
        ("1-01:01:01", 90061),
        ("UNLIMITED", None),
    ],
)
def test_every_form_of_a_slurm_time_is_read(time: str | int, seconds: int | None):
    assert seconds_of(time) == seconds


@pytest.mark.parametrize("text", ["24h", "", "1:2:3:4", "-5", "1-"])
def test_what_is_no_time_is_an_error(text: str):
    with pytest.raises(ValueError):
        seconds_of(text)


def test_a_time_limit_is_text_with_and_without_quotes(tmp_path: Path):
    file = tmp_path / "job.yaml"
    file.write_text("slurm:\n  time: 12:30:00\n")
    assert load_config([file], REQUIRED).slurm.time == "12:30:00"
    assert load_config([], [*REQUIRED, "--time", "24:00:00"]).slurm.time == "24:00:00"
    assert load_config([], [*REQUIRED, "--time", "90"]).slurm.time == 90


def test_an_override_may_be_written_with_dashes():
    config = load_config(
        [], [*REQUIRED, "--gpus-per-node", "4", "--actor.tensor-parallel-size=2", "--slurm.environment.A_B", "x"]
    )
    assert (config.slurm.gpus_per_node, config.actor.tensor_parallel_size) == (4, 2)
    assert config.slurm.environment == {"A_B": "x"}


@pytest.mark.parametrize(
    ("override", "rule"),
    [
        (("--slurm.time", "soon"), "a time as Slurm writes it"),
        (("--slurm.partition", '"a\\nb"'), "one line of text"),
        (("--slurm.environment.A-B", "x"), "names made of letters, digits and _"),
        (("--slurm.environment.A", "1"), "be text"),
    ],
)
def test_what_a_batch_script_cannot_hold_is_an_error(override: tuple[str, str], rule: str):
    with pytest.raises(ConfigError, match=rule):
        load_config([], [*REQUIRED, *override])
