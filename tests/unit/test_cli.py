"""The command line up to the point where `train.run` takes over."""

import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from dapo_megatron import cli
from dapo_megatron.config.schema import Config
from dapo_megatron.types import CheckpointError, ConfigError, DataError, RewardError, WorkerDiedError

CONFIG_TEXT = "model: {path: models/tiny}\ndata: {path: train.jsonl}\n"


@pytest.fixture
def runs(monkeypatch) -> list[tuple[Config, bool]]:
    """What `train.run` was called with."""
    calls: list[tuple[Config, bool]] = []

    def run(config: Config, *, check_only: bool, strict: bool) -> int:
        calls.append((config, check_only))
        return 0

    module = ModuleType("dapo_megatron.train")
    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "dapo_megatron.train", module)
    return calls


@pytest.fixture
def config_file(tmp_path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(CONFIG_TEXT)
    return file


def call(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["dapo-megatron", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_train_hands_over_the_merged_config(monkeypatch, runs, config_file, tmp_path):
    second = tmp_path / "second.yaml"
    second.write_text("run: {seed: 1}\ntrain: {num_rollout_steps: 3}\n")
    overrides = ("--actor.pipeline_parallel_size", 2, "--seed=7", "--reward.wrong_reward", -1)
    assert call(monkeypatch, "train", config_file, second, *overrides) == 0
    ((config, check_only),) = runs
    assert (config.run.seed, config.train.num_rollout_steps, config.actor.pipeline_parallel_size) == (7, 3, 2)
    assert config.reward.wrong_reward == -1
    assert not check_only


@pytest.mark.parametrize("position", [0, 1, 3])
def test_check_flag_may_stand_anywhere(monkeypatch, runs, config_file, position):
    arguments: list[object] = [config_file, "--seed", "7"]
    arguments.insert(position, "--check")
    assert call(monkeypatch, "train", *arguments) == 0
    ((config, check_only),) = runs
    assert check_only and config.run.seed == 7


def test_files_and_overrides_are_told_apart_in_any_order():
    files, overrides = cli.split_arguments(["--seed", "7", "a.yaml", "--lr=1", "b.yaml"])
    assert files == [Path("a.yaml"), Path("b.yaml")]
    assert overrides == ["--seed", "7", "--lr=1"]


def test_config_problems_are_all_printed_without_traceback(monkeypatch, runs, config_file, capsys):
    assert call(monkeypatch, "train", config_file, "--run.sed", "7", "--model.dtype", "fp8") == 2
    error = capsys.readouterr().err
    assert error.count("error: ") == 2
    assert "did you mean --run.seed" in error and "must be fp32 or bf16" in error
    assert "Traceback" not in error
    assert runs == []


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError(["one", "two"]), 2),
        (DataError("bad row"), 2),
        (RewardError("no such function"), 2),
        (CheckpointError("damaged"), 2),
        (WorkerDiedError("rank 3"), 1),
    ],
)
def test_exit_code_tells_bad_input_from_a_failed_run(monkeypatch, runs, config_file, capsys, error, code):
    def run(config: Config, *, check_only: bool, strict: bool) -> int:
        raise error

    monkeypatch.setattr(sys.modules["dapo_megatron.train"], "run", run)
    assert call(monkeypatch, "train", config_file) == code
    printed = capsys.readouterr().err
    assert all(f"error: {line}" in printed for line in str(error).splitlines())


def test_exit_code_of_the_run_is_passed_on(monkeypatch, runs, config_file):
    monkeypatch.setattr(sys.modules["dapo_megatron.train"], "run", lambda config, **_: 3)
    assert call(monkeypatch, "train", config_file) == 3


def test_bug_keeps_its_traceback_and_is_not_worth_another_start(monkeypatch, runs, config_file, capsys):
    def run(config: Config, *, check_only: bool, strict: bool) -> int:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(sys.modules["dapo_megatron.train"], "run", run)
    monkeypatch.setattr(sys, "argv", ["dapo-megatron", "train", str(config_file)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2 and 'raise ZeroDivisionError("a bug")' in capsys.readouterr().err


def test_config_command_lists_a_section_with_defaults_and_meanings(monkeypatch, capsys):
    assert call(monkeypatch, "config", "actor.optimizer") == 0
    text = capsys.readouterr().out
    assert "actor.optimizer.lr: 1.0e-06  [number > 0]" in text
    assert "Learning rate after warm-up." in text
    assert "actor.num_ranks" not in text


def test_config_command_marks_required_paths(monkeypatch, capsys):
    assert call(monkeypatch, "config") == 0
    text = capsys.readouterr().out
    assert "model.path: required  [path]" in text
    assert "rollout.top_k: null" in text


def test_config_command_suggests_near_names(monkeypatch, capsys):
    assert call(monkeypatch, "config", "rewad") == 2
    assert "did you mean reward" in capsys.readouterr().err


def test_version_lists_the_packages_that_matter(monkeypatch, capsys):
    assert call(monkeypatch, "--version") == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == ["dapo-megatron", "torch", "megatron-core", "transformers", "ray"]


def test_help_shows_examples_and_how_overrides_work(monkeypatch, capsys):
    assert call(monkeypatch, "train", "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--actor.pipeline_parallel_size" in text and "Overrides come last" in text


def test_importing_the_command_line_loads_no_heavy_package():
    code = "import sys, dapo_megatron.cli; print(sorted({'torch', 'megatron', 'ray', 'transformers'} & set(sys.modules)))"
    start = time.monotonic()
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
    assert time.monotonic() - start < 5
