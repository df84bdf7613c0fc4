"""The results of a farm in a folder: one line of JSON for every finished member, and the state of unfinished groups."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sidecast.errors import ConfigError
from sidecast.evaluation.farm import MemberResult
from sidecast.evaluation.settings import MemberSettings

RESULTS_NAME = "results.jsonl"


@dataclass(frozen=True, kw_only=True)
class Finished:
    """One finished member.

    Attributes:
        key: Follows from its settings, its task's recipe and text, and the precision.
        settings: What it was.
        result: What came of it.
        conditions: Versions and hardware, for people.
    """

    key: str
    settings: MemberSettings
    result: MemberResult
    conditions: Mapping[str, Any]

    def to_line(self) -> str:
        """One line of JSON; an infinite value is written as null."""
        values = {
            "key": self.key,
            "settings": self.settings.to_json(),
            "result": _finite(vars(self.result)),
            "conditions": dict(self.conditions),
        }
        return json.dumps(values, sort_keys=True) + "\n"

    @classmethod
    def from_line(cls, line: str) -> Finished:
        """What ``to_line`` wrote."""
        values = json.loads(line)
        result = values["result"]
        return cls(
            key=values["key"],
            settings=MemberSettings.from_json(values["settings"]),
            result=MemberResult(
                final_losses={name: _number(loss) for name, loss in result["final_losses"].items()},
                curve=[(step, _number(loss)) for step, loss in result["curve"]],
                worst_spike=_number(result["worst_spike"]),
                method_s=result["method_s"],
                step_s=result["step_s"],
                method=result["method"],
            ),
            conditions=values["conditions"],
        )


class ResultStore:
    """A folder of results; only one process at a time may write to it.

    Args:
        folder: Is made if it does not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = folder / RESULTS_NAME

    @property
    def corpora(self) -> Path:
        """Where the texts are kept that were trained on."""
        return self.folder / "corpora"

    def read(self) -> dict[str, Finished]:
        """All finished members by key; a line that a crash cut short is passed over.

        Raises:
            ConfigError: A whole line is no result.
        """
        if not self._path.exists():
            return {}
        finished = {}
        lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
        for number, line in enumerate(lines, 1):
            try:
                member = Finished.from_line(line)
            except (ValueError, KeyError, TypeError) as error:
                if number == len(lines) and not line.endswith("\n"):
                    continue
                raise ConfigError(f"{self._path}, line {number} is no result of this version: {error}") from error
            finished[member.key] = member
        return finished

    def add(self, members: Iterable[Finished]) -> None:
        """Appends finished members."""
        self.folder.mkdir(parents=True, exist_ok=True)
        text = "".join(member.to_line() for member in members)
        self._drop_cut_line()
        with self._path.open("a", encoding="utf-8") as file:
            file.write(text)

    def _drop_cut_line(self) -> None:
        if self._path.exists():
            whole = self._path.read_bytes()
            if not whole.endswith(b"\n"):
                os.truncate(self._path, whole.rfind(b"\n") + 1)

    def save_state(self, keys: Sequence[str], state: Mapping[str, Any]) -> None:
        """Keeps the state of an unfinished group."""
        path = self._state_path(keys)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".tmp")
        torch.save({"keys": list(keys), "state": state}, unfinished)
        unfinished.replace(path)

    def load_state(self, keys: Sequence[str]) -> Mapping[str, Any] | None:
        """The state that a group of these members was left in, if there is one."""
        path = self._state_path(keys)
        if not path.exists():
            return None
        saved = torch.load(path, weights_only=True)
        assert saved["keys"] == list(keys)
        state: Mapping[str, Any] = saved["state"]
        return state

    def drop_state(self, keys: Sequence[str]) -> None:
        """Forgets the state of a group that is finished."""
        self._state_path(keys).unlink(missing_ok=True)

    def _state_path(self, keys: Sequence[str]) -> Path:
        name = hashlib.blake2b(" ".join(keys).encode(), digest_size=12).hexdigest()
        return self.folder / "unfinished" / f"{name}.pt"


def _number(value: float | None) -> float:
    return math.inf if value is None else value


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
