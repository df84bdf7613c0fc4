"""What came of runs with forks, in a folder: one line of JSON for each."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sidecast.errors import ConfigError
from sidecast.evaluation.forks.run import Losses
from sidecast.evaluation.forks.settings import ForkSettings

FILE_NAME = "forks.jsonl"


@dataclass(frozen=True, kw_only=True)
class ForkResult:
    """One finished run.

    Attributes:
        key: Follows from its settings, its task's recipe and text, and the precision.
        settings: What it was.
        losses: By step and name; see ``ForkedRun.losses``.
        conditions: Versions and hardware, for people.
    """

    key: str
    settings: ForkSettings
    losses: Mapping[int, Mapping[str, Losses]]
    conditions: Mapping[str, Any]

    def to_line(self) -> str:
        """One line of JSON; an infinite value is written as null."""
        losses = {
            str(step): {name: [loss if math.isfinite(loss) else None for loss in pair] for name, pair in named.items()}
            for step, named in self.losses.items()
        }
        values = {"key": self.key, "settings": self.settings.to_json(), "losses": losses}
        return json.dumps({**values, "conditions": dict(self.conditions)}, sort_keys=True) + "\n"

    @classmethod
    def from_line(cls, line: str) -> ForkResult:
        """What ``to_line`` wrote."""
        values = json.loads(line)
        losses: dict[int, dict[str, Losses]] = {}
        for step, named in values["losses"].items():
            pairs = ((name, [math.inf if loss is None else loss for loss in pair]) for name, pair in named.items())
            losses[int(step)] = {name: (probe, held_out) for name, (probe, held_out) in pairs}
        settings = ForkSettings.from_json(values["settings"])
        return cls(key=values["key"], settings=settings, losses=losses, conditions=values["conditions"])


def read_forks(folder: Path) -> dict[str, ForkResult]:
    """All finished runs by key; a line that a crash cut short is passed over.

    Raises:
        ConfigError: A whole line is no result.
    """
    path, found = folder / FILE_NAME, {}
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    for number, line in enumerate(lines, 1):
        if not line.endswith("\n"):
            continue
        try:
            result = ForkResult.from_line(line)
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}, line {number} is no result of this version: {error}") from error
        found[result.key] = result
    return found


def add_fork(folder: Path, result: ForkResult) -> None:
    """Appends a finished run; only one process at a time may."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE_NAME
    if path.exists() and not (whole := path.read_bytes()).endswith(b"\n"):
        os.truncate(path, whole.rfind(b"\n") + 1)
    with path.open("a", encoding="utf-8") as file:
        file.write(result.to_line())
