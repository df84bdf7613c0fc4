"""When an interrupted transfer is tried again, and when it is given up."""

from __future__ import annotations

import time
from collections.abc import Callable

from sidecast.trainer.courier.link import FIRST_BACKOFF_S, MAX_BACKOFF_S, Link

MAX_CORRUPT = 3


class Attempts:
    """The attempts of one transfer of one session.

    Args:
        link: Says whether the service is there.
        session_id: The session; the transfer ends with it.
        deadline_s: When the transfer must be over, on the clock.
        clock: Monotonic seconds.
    """

    def __init__(
        self, link: Link, session_id: str, deadline_s: float, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._link = link
        self._session_id = session_id
        self._deadline_s = deadline_s
        self._clock = clock
        self._backoff_s = FIRST_BACKOFF_S
        self._num_corrupt = 0

    def note_corrupt(self) -> None:
        """Counts an attempt whose bytes were damaged: a path that damages them always is not tried for ever."""
        self._num_corrupt += 1

    def wait(self) -> bool:
        """Waits for the link and the back-off, each time twice as long up to a maximum.

        Returns:
            Whether the transfer may be tried again; not after the deadline, too many damaged attempts, or the
            session's end, which is noticed at once.
        """
        left_s = self._deadline_s - self._clock()
        if self._num_corrupt == MAX_CORRUPT or left_s <= 0:
            return False
        if not self._link.wait_connected(self._session_id, left_s, outlasts_outage=True):
            return False
        backoff_s = self._backoff_s
        self._backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)
        return self._link.rest(self._session_id, backoff_s)
