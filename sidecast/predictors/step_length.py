"""How much of a predicted change is used, for all parameters or by name."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from math import isfinite

from sidecast.errors import ConfigError

StepLength = float | Mapping[str, float]
"""One factor, or factors by shell pattern on the dotted name; the first match counts, 1 without any."""


def check_step_length(name: str, value: StepLength) -> None:
    """Raises ConfigError unless every factor is a finite number of at least 0."""
    entries = value.items() if isinstance(value, Mapping) else [("*", value)]
    for pattern, factor in entries:
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not isfinite(factor) or factor < 0:
            where = f"{name}[{pattern!r}]" if isinstance(value, Mapping) else name
            raise ConfigError(f"{where} is {factor!r}; it must be a finite number of at least 0")


def step_length(value: StepLength, fqn: str) -> float:
    """The factor for one parameter."""
    if not isinstance(value, Mapping):
        return float(value)
    return next((float(factor) for pattern, factor in value.items() if fnmatchcase(fqn, pattern)), 1.0)
