"""Lets a log line through once in a while, so that nobody who causes it fills a disk with it."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable

MAX_KINDS = 256


class Rarely:
    """One of each kind per interval.

    Args:
        interval_s: Least time between two lines of one kind, in seconds.
        clock: Monotonic seconds.
    """

    def __init__(self, interval_s: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._interval_s = interval_s
        self._clock = clock
        self._said: dict[Hashable, tuple[float, int]] = {}

    def num_unsaid(self, kind: Hashable) -> int | None:
        """Whether a line may be written.

        Args:
            kind: What it is about; more than ``MAX_KINDS`` of them count as one.

        Returns:
            How many of its kind were left out since the last one; None if this one is to be left out, too.
        """
        if kind not in self._said and len(self._said) >= MAX_KINDS:
            kind = None
        now_s = self._clock()
        said_s, num_unsaid = self._said.get(kind, (-float("inf"), 0))
        if now_s - said_s < self._interval_s:
            self._said[kind] = said_s, num_unsaid + 1
            return None
        self._said[kind] = now_s, 0
        return num_unsaid
