"""Telling a run, a checkpoint and an HF directory apart."""

import json
from pathlib import Path

import pytest

from dapo_megatron.launcher.policy_source import find_policy
from dapo_megatron.launcher.run_folder import RunFolder
from dapo_megatron.types import CheckpointError


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    folder = tmp_path / "models" / "tiny"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "model.safetensors").write_bytes(b"x" * 3_000_000)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with complete checkpoints after 4 and 12 steps, and one that a crash left."""
    folder = RunFolder(tmp_path / "run")
    folder.create({"config": {"model": {"path": "models/tiny"}, "run": {"seed": 5}}})
    for num_steps in (4, 12, 20):
        directory = folder.begin_checkpoint(num_steps)
        for part in ("weights", "optimizer"):
            (directory / "actor" / part).mkdir(parents=True)
            (directory / "actor" / part / "__0_0.distcp").write_bytes(f"{part} {num_steps}".encode())
        if num_steps < 20:
            folder.complete_checkpoint(directory, {})
    return folder.path


def test_a_run_stands_for_its_newest_complete_checkpoint(run: Path):
    source = find_policy(run)
    assert (source.path, source.weight_version) == (run / "checkpoints" / "step_000012", 12)
    assert source.run is not None and source.base_config()["run"]["seed"] == 5
    assert source.default_out("data/aime2024.jsonl") == run / "evaluations" / "step_000012_aime2024"


def test_a_checkpoint_stands_for_itself(run: Path):
    source = find_policy(run / "checkpoints" / "step_000004")
    assert (source.path.name, source.weight_version) == ("step_000004", 4)
    assert source.fingerprint() != find_policy(run).fingerprint()
    assert list(source.weight_digests()) == ["weights/__0_0.distcp"]
    assert (source.actor_directory() / "weights" / "__0_0.distcp").is_file()


def test_a_checkpoint_kept_for_its_weights_is_the_same_policy(run: Path):
    before = find_policy(run / "checkpoints" / "step_000004").fingerprint()
    RunFolder(run).prune(keep_last=1, keep_every=4)
    assert not (run / "checkpoints" / "step_000004" / "actor" / "optimizer").exists()
    assert find_policy(run / "checkpoints" / "step_000004").fingerprint() == before
    assert find_policy(run).weight_version == 12


def test_an_hf_directory_is_version_0_and_its_own_model(hf: Path):
    source = find_policy(hf)
    assert (source.run, source.weight_version) == (None, 0)
    assert source.base_config()["model"]["path"] == str(hf)
    assert source.default_out("openai/gsm8k") == Path("evaluations/tiny_gsm8k")


@pytest.mark.parametrize("position", [0, 2_999_999])
def test_the_fingerprint_changes_with_the_weights_and_not_with_their_place(hf: Path, position: int):
    before = find_policy(hf).fingerprint()
    moved = hf.rename(hf.with_name("moved"))
    assert find_policy(moved).fingerprint() == before
    with (moved / "model.safetensors").open("r+b") as file:
        file.seek(position)
        file.write(b"y")
    assert find_policy(moved).fingerprint() != before


def test_what_is_none_of_them_is_refused_with_what_to_give(run: Path, tmp_path: Path):
    with pytest.raises(CheckpointError, match="does not exist; give a run folder"):
        find_policy(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="neither a run folder nor an HF directory"):
        find_policy(run / "checkpoints")
    with pytest.raises(CheckpointError, match="COMPLETE is missing"):
        find_policy(run / "checkpoints" / "step_000020.tmp")


def test_a_run_without_a_checkpoint_names_what_can_be_evaluated(run: Path):
    for marker in run.rglob("COMPLETE"):
        marker.unlink()
    with pytest.raises(CheckpointError, match="holds no complete checkpoint; .* or evaluate models/tiny"):
        find_policy(run)


def test_a_checkpoint_outside_of_its_run_lacks_the_settings(run: Path, tmp_path: Path):
    (tmp_path / "checkpoints").mkdir()
    alone = (run / "checkpoints" / "step_000004").rename(tmp_path / "checkpoints" / "step_000004")
    with pytest.raises(CheckpointError, match="needs the settings of its run"):
        find_policy(alone)
