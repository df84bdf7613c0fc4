"""Whose work is next: that of the run which has had least of the engine's time, so that small runs pass large ones."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager


class Turns:
    """One at a time; lives on one event loop.

    Args:
        clock: Monotonic seconds.

    Attributes:
        current: The run whose turn it is; empty for nobody's.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.current = ""
        self._is_taken = False
        # In the order in which they came.
        self._waiting: list[tuple[str, asyncio.Future[None]]] = []
        self._used_s: dict[str, float] = {}
        # What whoever had the last turn had used before: a run that comes anew, or back, is no further behind.
        self._floor_s = 0.0

    @property
    def is_taken(self) -> bool:
        """Whether somebody has a turn, or is just called."""
        return self._is_taken

    @property
    def num_waiting(self) -> int:
        """How many wait for theirs."""
        return len(self._waiting)

    @asynccontextmanager
    async def turn(self, run_id: str) -> AsyncGenerator[None, None]:
        """Waits for a run's turn, and ends it with the block."""
        self._used_s[run_id] = max(self._used_s.get(run_id, 0.0), self._floor_s)
        if self._is_taken:
            await self._wait(run_id)
        self._is_taken, self.current = True, run_id
        began_s = self._clock()
        try:
            yield
        finally:
            self._used_s[run_id] = self._used_s.get(run_id, self._floor_s) + self._clock() - began_s
            self._pass_on()

    async def _wait(self, run_id: str) -> None:
        called: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((run_id, called))
        try:
            await called
        except asyncio.CancelledError:
            if called.done() and not called.cancelled():
                # Called in the same moment: the turn is the next one's.
                self._pass_on()
            else:
                self._waiting.remove((run_id, called))
            raise

    def _pass_on(self) -> None:
        if not self._waiting:
            self._is_taken, self.current = False, ""
            return
        index = min(range(len(self._waiting)), key=lambda i: self._used_s[self._waiting[i][0]])
        run_id, called = self._waiting.pop(index)
        self._floor_s = self._used_s[run_id]
        waiting = {name for name, _ in self._waiting} | {run_id}
        self._used_s = {name: s for name, s in self._used_s.items() if s > self._floor_s or name in waiting}
        called.set_result(None)
