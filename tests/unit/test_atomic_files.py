from __future__ import annotations

from pathlib import Path

import pytest

from sidecast.atomic_files import replacing


def test_a_file_appears_once_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    path.write_text("old")
    with replacing(path) as partial:
        partial.write_text("new")
        assert (path.read_text(), partial.parent) == ("old", tmp_path)
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_was_there_stays_if_writing_fails(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "state.json"
    path.write_text("old")
    with pytest.raises(type(error)), replacing(path) as partial:  # noqa: PT012 - the file is half-written first
        partial.write_text("ne")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_files_that_differ_in_their_endings_do_not_share_one(tmp_path: Path) -> None:
    with replacing(tmp_path / "rank0.f32") as delta, replacing(tmp_path / "rank0.jsonl") as log:
        delta.write_text("delta")
        log.write_text("log")
    assert (tmp_path / "rank0.f32").read_text() == "delta"
    assert (tmp_path / "rank0.jsonl").read_text() == "log"
