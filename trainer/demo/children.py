"""Child processes that never outlive us."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from sidecast.errors import SidecastError
from sidecast.trainer.demo.process_groups import end_group

REFUSAL = re.compile(r"sidecast: (?:error: )?(.+)")
EXCEPTION = re.compile(r"(?:\[rank\d+\]: )?((?:\w+\.)*\w*(?:Error|Exception|Interrupt)\b.*)")


class ChildFailedError(SidecastError):
    """A process that we started ended on its own, or not as it should."""


@dataclass(frozen=True)
class Child:
    """A running child.

    Attributes:
        name: What it is, for messages.
        process: Leader of its own process group.
        log_path: Receives all of its output.
    """

    name: str
    process: subprocess.Popen[bytes]
    log_path: Path

    def failure(self) -> ChildFailedError:
        """What to raise about a child that has ended and should not have, in one line."""
        code = self.process.wait()
        end = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
        reason = last_reason(self.log_path.read_text(errors="replace").splitlines())
        return ChildFailedError(f"{self.name} {end}{f': {reason}' if reason else ''} (its log: {self.log_path})")


def last_reason(lines: Iterable[str]) -> str | None:
    """What a log says about why its process failed: our own refusal, or else the last exception's line."""
    refusal = exception = None
    for line in lines:
        if match := REFUSAL.match(line):
            refusal = match[1]
        elif match := EXCEPTION.match(line):
            exception = match[1]
    return refusal if refusal is not None else exception


class Children:
    """Starts children, each in its own process group, and ends them all when the block is left.

    A guardian process ends them if we are killed.
    """

    def __init__(self) -> None:
        self._running: list[Child] = []
        self._guardian: subprocess.Popen[str] | None = None

    def __enter__(self) -> Children:
        self._guardian = subprocess.Popen(
            [sys.executable, "-m", "sidecast.trainer.demo.guardian"],
            stdin=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for child in reversed(self._running.copy()):
            self.end(child)
        assert self._guardian is not None
        assert self._guardian.stdin is not None
        self._guardian.stdin.close()
        self._guardian.wait()

    def start(self, name: str, command: Sequence[str], log_path: Path, environment: Mapping[str, str]) -> Child:
        """Starts a child with its output in ``log_path``."""
        log_path.parent.mkdir(parents=True, exist_ok=True)
        with log_path.open("wb") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                start_new_session=True,
            )
        self._tell_guardian(f"+{process.pid}")
        child = Child(name, process, log_path)
        self._running.append(child)
        return child

    def end(self, child: Child) -> None:
        """Ends a child and everything in its group; it may have ended already."""
        end_group(child.process.pid, child.process.poll)
        child.process.wait()
        self._running.remove(child)
        self._tell_guardian(f"-{child.process.pid}")

    def _tell_guardian(self, order: str) -> None:
        assert self._guardian is not None
        assert self._guardian.stdin is not None
        self._guardian.stdin.write(order + "\n")
        self._guardian.stdin.flush()
