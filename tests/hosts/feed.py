"""What the ranks tell, as it comes out of the launcher."""

from __future__ import annotations

import json
import queue
import subprocess
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

# Begins what a rank tells, after the host that pdsh puts in front of every line.
MARK = "@sidecast "
NUM_RANKS = 2
TAIL_LINES = 40


class EndedError(Exception):
    """The launcher ended, or fell silent, before what was waited for."""


class Feed:
    """Follows a launcher's output.

    Args:
        process: The launcher, with its output on ``stdout``.
        log: Receives all that is no rank's line.
        hang_s: So long a silence is a hang.

    Attributes:
        step: The newest step that both ranks have made.
    """

    def __init__(self, process: subprocess.Popen[str], log: Path, hang_s: float) -> None:
        self.process = process
        self._log = log
        self._hang_s = hang_s
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._events: list[dict[str, Any]] = []
        self._step_times_s: list[list[float]] = [[] for _ in range(NUM_RANKS)]
        threading.Thread(target=self._pump, daemon=True).start()

    def _pump(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    @property
    def step(self) -> int:
        return min(len(times_s) for times_s in self._step_times_s)

    def _take(self, timeout_s: float) -> bool:
        """Takes in one line; false at the end."""
        line = self._lines.get(timeout=timeout_s)
        if line is None:
            return False
        _, mark, told = line.partition(MARK)
        if not mark:
            with self._log.open("a") as stream:
                stream.write(line)
            return True
        event = json.loads(told)
        if event["kind"] == "step":
            self._step_times_s[event["rank"]].append(event["at_s"])
        else:
            self._events.append(event)
        return True

    def told(self, kind: str, rank: int = 0) -> list[dict[str, Any]]:
        """A rank's events of a kind so far."""
        return [event for event in self._events if event["kind"] == kind and event["rank"] == rank]

    def wait(self, kind: str, *, after_step: int = 0, base_from: int = 0) -> int:
        """Blocks until both ranks have told of an event of a kind.

        Args:
            kind: ``step``, or an event's.
            after_step: Only one after this step counts.
            base_from: Only one whose base step is this or later counts.

        Returns:
            The step of the first such event.

        Raises:
            EndedError: It did not come.
        """
        while True:
            if kind == "step":
                found = [self.step] * NUM_RANKS if self.step else []
            else:
                found = [
                    next((e["step"] for e in self.told(kind, rank) if _counts(e, after_step, base_from)), 0)
                    for rank in range(NUM_RANKS)
                ]
            if found and all(found):
                return max(found)
            try:
                if not self._take(self._hang_s):
                    raise EndedError(f"the launcher ended before both ranks told of {kind!r}:\n{self.tail()}")
            except queue.Empty:
                raise EndedError(f"nothing was heard for {self._hang_s:.0f} s; awaited: {kind!r}") from None

    def read_until(self, deadline_s: float) -> None:
        """Takes in what comes until a time on the monotonic clock."""
        while (left_s := deadline_s - time.monotonic()) > 0:
            try:
                if not self._take(left_s):
                    raise EndedError(f"the launcher ended:\n{self.tail()}")
            except queue.Empty:
                return

    def read_to_end(self) -> None:
        """Takes in all that is left."""
        while self._take(self._hang_s):
            pass

    def slowest_step_s(self, first: int, last: int) -> float:
        """The longest time between two steps of one rank, of those from ``first`` to ``last``."""
        slowest_s = 0.0
        for times_s in self._step_times_s:
            steps = times_s[max(0, first - 1) : last]
            slowest_s = max([slowest_s, *(after - before for before, after in pairwise(steps))])
        return slowest_s

    def tail(self) -> str:
        """The last of what was said that was no rank's line."""
        if not self._log.exists():
            return ""
        return "\n".join(self._log.read_text().splitlines()[-TAIL_LINES:])


def _counts(event: dict[str, Any], after_step: int, base_from: int) -> bool:
    return event["step"] > after_step and event["details"].get("base_step", 0) >= base_from
