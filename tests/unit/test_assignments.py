from __future__ import annotations

from typing import Any

import pytest

from sidecast.assignments import parse_assignment
from sidecast.evaluation.grid import parse_arm
from sidecast.trainer.job.config import parse_override

DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("text", "assignment"),
    [
        ("gain=0.5", ("gain", 0.5)),
        ("a.b=null", ("a.b", None)),
        ("name=word", ("name", "word")),
        ("name=", ("name", "")),
        ("url=a=b", ("url", "a=b")),
        (f"name={DEEP}", ("name", DEEP)),
        ("name", None),
        ("=value", None),
        ("", None),
    ],
)
def test_a_value_is_json_or_else_the_text(text: str, assignment: tuple[str, Any] | None) -> None:
    assert parse_assignment(text) == assignment


def test_every_command_takes_what_is_no_json_as_text() -> None:
    assert parse_override(f"training.seed={DEEP}") == ("training.seed", DEEP)
    assert parse_arm(f"nino:weights={DEEP}").method.options["weights"] == DEEP
