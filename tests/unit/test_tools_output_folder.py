"""The output folder: atomic, resumable, never lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from checkpoint_tools.errors import WriteError, writing
from checkpoint_tools.output_folder import check_room, open_output
from dapo_megatron.types import CheckpointError

SOURCE = {"command": "convert", "source": "a", "dtype": "keep"}


def make(final: Path, content: str, force: bool = False) -> None:
    with open_output(final, SOURCE, force) as folder:
        (folder.path / "file").write_text(content)
        folder.finish()


def interrupt(final: Path, identity: dict[str, str] = SOURCE, force: bool = False) -> None:
    """Finish one task, then stop."""
    with open_output(final, identity, force) as folder:
        (folder.path / "half").write_text("half")
        folder.record("task", {"xxh3": "1"})


def test_the_final_name_appears_only_when_complete(tmp_path: Path):
    final = tmp_path / "deep" / "out"
    with open_output(final, SOURCE, force=False) as folder:
        (folder.path / "file").write_text("new")
        assert not final.exists()
        folder.finish()
    assert (final / "file").read_text() == "new"
    assert [path.name for path in final.parent.iterdir()] == ["out"]


def test_what_was_finished_is_found_again(tmp_path: Path):
    interrupt(tmp_path / "out")
    with open_output(tmp_path / "out", SOURCE, force=False) as folder:
        assert folder.finished == {"task": {"xxh3": "1"}}
        assert (folder.path / "half").read_text() == "half"


def test_a_claim_cut_short_by_a_kill_is_not_believed(tmp_path: Path):
    interrupt(tmp_path / "out")
    journal = tmp_path / "out.partial" / "journal.jsonl"
    journal.write_text(journal.read_text() + '{"name": "other", "rec')
    for _ in range(2):
        with open_output(tmp_path / "out", SOURCE, force=False) as folder:
            assert list(folder.finished) == ["task"]


def test_unfinished_work_of_another_source_is_refused_with_both(tmp_path: Path):
    interrupt(tmp_path / "out")
    with pytest.raises(CheckpointError, match=r'"source": "a".*"source": "b".*--force'):
        interrupt(tmp_path / "out", {**SOURCE, "source": "b"})
    with open_output(tmp_path / "out", {**SOURCE, "source": "b"}, force=True) as folder:
        assert not folder.finished and not list(folder.path.iterdir())


def test_a_complete_output_is_replaced_only_by_force_and_only_at_the_end(tmp_path: Path):
    final = tmp_path / "out"
    make(final, "old")
    with pytest.raises(CheckpointError, match="--force"):
        make(final, "new")
    interrupt(final, force=True)
    assert (final / "file").read_text() == "old"
    make(final, "new", force=True)
    assert (final / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path: Path):
    final = tmp_path / "out"
    make(final, "old")
    interrupt(final, force=True)
    final.rename(tmp_path / "out.partial" / "replaced")
    with open_output(final, SOURCE, force=False) as folder:
        assert (final / "file").read_text() == "old"
        assert list(folder.finished) == ["task"]


def test_two_processes_do_not_write_one_output(tmp_path: Path):
    with (
        open_output(tmp_path / "out", SOURCE, force=False),
        pytest.raises(CheckpointError, match="another process"),
        open_output(tmp_path / "out", SOURCE, force=False),
    ):
        pass


def test_a_file_in_the_way_is_named(tmp_path: Path):
    (tmp_path / "out").write_text("")
    with pytest.raises(CheckpointError, match="out is a file"):
        make(tmp_path / "out", "new", force=True)


def test_room_is_asked_for_before_work_and_counts_what_is_written(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"needs 1e\+03 TB|needs 1000 TB|free some space"):
        check_room(tmp_path / "out", 10**15)
    interrupt(tmp_path / "out")
    check_room(tmp_path / "out", 1)


def test_a_full_disk_says_that_the_same_command_continues():
    with pytest.raises(WriteError, match="/dev/full.*No space left.*run the same command again"), writing("/dev/full"):
        Path("/dev/full").write_text("x")
