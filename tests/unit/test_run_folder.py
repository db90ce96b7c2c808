"""Checkpoints of a run folder: complete or invisible, never silently ignored."""

from __future__ import annotations

from pathlib import Path

import pytest

from dapo_megatron.launcher.run_folder import RunFolder, num_steps_of, read_marker, require_complete
from dapo_megatron.types import CheckpointError
from dapo_megatron.weights.file_digest import FileDigest


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.create({"config": {}})
    return folder


def write(folder: RunFolder, num_steps: int) -> Path:
    directory = folder.begin_checkpoint(num_steps)
    for part, content in (("weights", b"12345"), ("optimizer", b"678")):
        (directory / "actor" / part).mkdir(parents=True)
        (directory / "actor" / part / "file").write_bytes(content)
    return folder.complete_checkpoint(directory, {})


def test_the_newest_complete_checkpoint_is_found_by_number(folder: RunFolder):
    for num_steps in (90, 1_000_000, 5):
        write(folder, num_steps)
    newest = folder.newest_checkpoint()
    assert newest is not None and num_steps_of(newest) == 1_000_000


def test_a_checkpoint_that_was_not_completed_is_not_seen_and_is_replaced(folder: RunFolder):
    write(folder, 1)
    (folder.begin_checkpoint(2) / "weights").write_bytes(b"12")
    newest = folder.newest_checkpoint()
    assert newest is not None and num_steps_of(newest) == 1
    write(folder, 3)
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == ["step_000001", "step_000003"]


def test_older_checkpoints_are_removed(folder: RunFolder):
    for num_steps in (1, 2, 3):
        write(folder, num_steps)
    folder.prune(keep_last=2, keep_every=None)
    assert [num_steps_of(path) for path in folder.complete_checkpoints()] == [2, 3]


def test_the_weights_of_every_second_step_stay_and_a_run_does_not_go_on_from_them(folder: RunFolder):
    for num_steps in (1, 2, 3, 4, 5):
        write(folder, num_steps)
        folder.prune(keep_last=1, keep_every=2)
    assert [num_steps_of(path) for path in folder.complete_checkpoints()] == [5]
    kept = folder.checkpoints / "step_000002"
    assert read_marker(kept).weights_only and list(read_marker(kept).files) == ["actor/weights/file"]
    assert sorted(path.name for path in kept.rglob("*")) == ["COMPLETE", "actor", "file", "weights"]
    require_complete(kept)
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == ["step_000002", "step_000004", "step_000005"]


def test_a_file_that_a_rank_reports_but_that_is_not_there_completes_nothing(folder: RunFolder):
    directory = folder.begin_checkpoint(1)
    with pytest.raises(OSError, match="is not there"):
        folder.complete_checkpoint(directory, {"actor/weights/gone": FileDigest(1, "00")})
    assert folder.newest_checkpoint() is None


@pytest.mark.parametrize("damage", ["removed", "shortened"])
def test_a_damaged_checkpoint_is_refused_by_name(folder: RunFolder, damage: str):
    checkpoint = write(folder, 1)
    require_complete(checkpoint)
    weights = checkpoint / "actor" / "weights" / "file"
    weights.unlink() if damage == "removed" else weights.write_bytes(b"1")
    with pytest.raises(CheckpointError, match=r"file should have 5 bytes"):
        require_complete(checkpoint)


def test_any_other_path_is_no_checkpoint(folder: RunFolder):
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        require_complete(folder.path)
    with pytest.raises(CheckpointError, match="is no checkpoint folder"):
        num_steps_of(folder.path)
