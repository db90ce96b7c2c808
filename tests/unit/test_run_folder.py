"""Checkpoints of a run folder: complete or invisible, never silently ignored."""

from __future__ import annotations

from pathlib import Path

import pytest

from dapo_megatron.launcher.run_folder import RunFolder, num_steps_of, require_complete
from dapo_megatron.types import CheckpointError


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.create({"config": {}})
    return folder


def write(folder: RunFolder, num_steps: int) -> Path:
    with folder.writing_checkpoint(num_steps) as directory:
        (directory / "weights").write_bytes(b"12345")
    return folder.checkpoints / f"step_{num_steps:06d}"


def test_the_newest_complete_checkpoint_is_found_by_number(folder: RunFolder):
    for num_steps in (90, 1_000_000, 5):
        write(folder, num_steps)
    newest = folder.newest_checkpoint()
    assert newest is not None and num_steps_of(newest) == 1_000_000


def test_a_checkpoint_that_fails_half_way_is_not_seen(folder: RunFolder):
    write(folder, 1)
    with pytest.raises(OSError), folder.writing_checkpoint(2) as directory:
        (directory / "weights").write_bytes(b"12")
        raise OSError("disk full")
    newest = folder.newest_checkpoint()
    assert newest is not None and num_steps_of(newest) == 1
    assert num_steps_of(write(folder, 2)) == 2, "the left-over is replaced"


def test_older_checkpoints_are_removed(folder: RunFolder):
    for num_steps in (1, 2, 3):
        write(folder, num_steps)
    folder.keep_newest(2)
    assert [num_steps_of(path) for path in folder.complete_checkpoints()] == [2, 3]


@pytest.mark.parametrize("damage", ["removed", "shortened"])
def test_a_damaged_checkpoint_is_refused_by_name(folder: RunFolder, damage: str):
    checkpoint = write(folder, 1)
    require_complete(checkpoint)
    weights = checkpoint / "weights"
    weights.unlink() if damage == "removed" else weights.write_bytes(b"1")
    with pytest.raises(CheckpointError, match=r"weights should have 5 bytes"):
        require_complete(checkpoint)


def test_any_other_path_is_no_checkpoint(folder: RunFolder):
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        require_complete(folder.path)
    with pytest.raises(CheckpointError, match="is no checkpoint folder"):
        num_steps_of(folder.path)
