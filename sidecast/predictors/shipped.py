"""The weights that come with this package, for trained predictors that are given none."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sidecast.errors import ConfigError

FOLDER = Path(__file__).with_name("shipped_weights")


@dataclass(frozen=True)
class ShippedFile:
    """A file of weights.

    Attributes:
        name: In ``FOLDER``.
        sha256: Of its content.
    """

    name: str
    sha256: str


SHIPPED: Mapping[str, ShippedFile] = {}
"""By predictor."""


def shipped_weights(predictor: str, folder: Path = FOLDER) -> Path:
    """The file of a predictor's weights.

    Args:
        predictor: Its name.
        folder: Where it lies.

    Raises:
        ConfigError: None is shipped for this predictor, it is not there, or it is not what was shipped.
    """
    if predictor not in SHIPPED:
        raise ConfigError(f"predictor {predictor!r} needs a weights file; none was given")
    file = SHIPPED[predictor]
    path = folder / file.name
    if not path.is_file():
        raise ConfigError(
            f"predictor {predictor!r} was given no weights file, and its own, {path}, is not installed; "
            "give one, or reinstall sidecast"
        )
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != file.sha256:
        raise ConfigError(f"weights file {path} has the SHA-256 {found}; {file.sha256} was shipped: reinstall sidecast")
    return path
