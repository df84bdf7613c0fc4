"""What is compiled where it is used is compiled once, and again when a file of it is another."""

from __future__ import annotations

from pathlib import Path

import pytest

from sidecast.evaluation.native.compiling import compiled


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A function that returns 1, by way of two headers."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "inner.h").write_text("inline int inner() { return 1; }\n")
    (folder / "outer.h").write_text('#pragma once\n#include "inner.h"\n#include "outer.h"\n')
    path = folder / "answer.cpp"
    path.write_text('#include <cmath>\n#include "outer.h"\nextern "C" int answer() { return inner(); }\n')
    return path


def answer(source: Path, folder: Path) -> int:
    library = compiled(source, folder)
    if library is None:
        pytest.skip("no compiler")
    return int(library.answer())


def test_a_library_is_built_once(source: Path, tmp_path: Path) -> None:
    assert answer(source, tmp_path / "made") == 1
    (built,) = (tmp_path / "made").iterdir()
    before = built.stat()
    assert answer(source, tmp_path / "made") == 1
    assert [path.stat() for path in (tmp_path / "made").iterdir()] == [before]


def test_another_header_makes_another_library(source: Path, tmp_path: Path) -> None:
    assert answer(source, tmp_path / "made") == 1
    source.with_name("inner.h").write_text("inline int inner() { return 2; }\n")
    assert answer(source, tmp_path / "made") == 2


def test_a_header_that_is_not_there_is_named(source: Path, tmp_path: Path) -> None:
    answer(source, tmp_path / "made")
    source.with_name("inner.h").unlink()
    with pytest.raises(FileNotFoundError, match=r"inner\.h"):
        compiled(source, tmp_path / "made")


def test_what_cannot_be_compiled_makes_nothing(source: Path, tmp_path: Path) -> None:
    source.write_text("not C++")
    assert compiled(source, tmp_path / "made") is None
    assert list((tmp_path / "made").glob("*.so")) == []
