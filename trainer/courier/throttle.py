"""Keeps a courier's traffic below a rate, so that training's own communication has the network to itself."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

# What may pass at once after a pause.
BURST_S = 0.1


class Throttle:
    """A token bucket that transfers in several threads share.

    Args:
        bytes_per_s: Most bytes per second, on average; None for no limit.
        clock: Monotonic seconds.
        sleep: Waits for so many seconds.
    """

    def __init__(
        self,
        bytes_per_s: float | None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self._bytes_per_s = bytes_per_s
        self._clock = clock
        self._sleep = sleep
        self._lock = threading.Lock()
        # When everything that was let pass so far will have had its time.
        self._free_at_s = clock()

    def pass_bytes(self, num_bytes: int) -> None:
        """Returns once so many more bytes may go."""
        if self._bytes_per_s is None:
            return
        with self._lock:
            now_s = self._clock()
            self._free_at_s = max(self._free_at_s, now_s - BURST_S) + num_bytes / self._bytes_per_s
            wait_s = self._free_at_s - now_s
        if wait_s > 0:
            self._sleep(wait_s)

    def least_s(self, num_bytes: int) -> float:
        """How long so many bytes take at that rate."""
        return 0.0 if self._bytes_per_s is None else num_bytes / self._bytes_per_s
