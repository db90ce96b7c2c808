"""Files are whole or not there, whatever happens while they are written."""

from __future__ import annotations

from pathlib import Path

import pytest

from dapo_megatron.whole_files import whole_file, write_whole


@pytest.mark.parametrize("durable", [True, False])
def test_a_file_takes_the_place_of_the_older_one_when_it_is_written(tmp_path: Path, durable: bool):
    path = tmp_path / "state.json"
    path.write_text("older")
    with whole_file(path, durable=durable) as file:
        file.write(b"new")
        file.flush()
        assert path.read_text() == "older"
    assert path.read_text() == "new"
    write_whole(path, "zwölf", durable=durable)
    assert path.read_bytes() == "zwölf".encode()
    assert list(tmp_path.iterdir()) == [path]


def test_what_was_there_stays_when_the_writing_fails(tmp_path: Path):
    path = tmp_path / "state.json"
    path.write_text("older")
    with pytest.raises(ZeroDivisionError), whole_file(path) as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert path.read_text() == "older" and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_not_there_is_an_error_and_nothing_is_made(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "absent" / "state.json", "text")
    assert list(tmp_path.iterdir()) == []
