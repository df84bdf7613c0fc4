"""Refusals as users see them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sidecast.errors import ConfigError

_MAX_CHARACTERS = 2_000


@contextmanager
def one_line() -> Iterator[None]:
    """Lets a refusal pass if it is one line that says something, and nothing else."""
    try:
        yield
    except ConfigError as error:
        refusal = str(error)
        is_line = bool(refusal.strip()) and len(refusal.splitlines()) == 1 and len(refusal) < _MAX_CHARACTERS
        if not is_line:
            raise AssertionError(f"not one line: {refusal!r}") from error
