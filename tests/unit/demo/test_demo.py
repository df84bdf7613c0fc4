"""What the demo empties."""

from __future__ import annotations

from pathlib import Path

import pytest

from sidecast.errors import ConfigError
from sidecast.trainer.demo.__main__ import _empty


def test_an_earlier_demo_is_deleted_and_a_new_folder_made(tmp_path: Path) -> None:
    out = tmp_path / "runs" / "demo"
    _empty(out)
    (out / "service.log").write_text("of the last demo")
    _empty(out)
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("name", ["folder", "file"])
def test_what_is_not_a_demo_is_left_alone(tmp_path: Path, name: str) -> None:
    out = tmp_path / name
    kept = out
    if name == "folder":
        out.mkdir()
        kept = out / "thesis.tex"
    kept.write_text("years of work")
    with pytest.raises(ConfigError, match="would be emptied"):
        _empty(out)
    assert kept.read_text() == "years of work"
