"""Which of the compiled tile loops a test can run here."""

from __future__ import annotations

import pytest

from sidecast.predictors.nino.loops import LOOPS, Loops, compiled_loops


def loops_or_skip(name: str) -> Loops:
    """Some loops, or a skipped test that says what they need."""
    found = compiled_loops().get(name)
    if found is None:
        pytest.skip(f"the loops {name!r} need {LOOPS[name].needs}, and a compiler at installation")
    return found
