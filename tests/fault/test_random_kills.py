"""A few of the kills of ``python -m tests.fault.random_kills``."""

from __future__ import annotations

import pytest

from tests.fault.random_kills import run_killed, run_unharmed


@pytest.mark.parametrize("kind", ["bf16", "push"])
def test_services_killed_at_random_change_nothing_that_a_run_is_given(kind: str) -> None:
    killed = run_killed(kind, seed=0)
    assert killed.num_kills > 5
    assert killed.given == run_unharmed(kind)
