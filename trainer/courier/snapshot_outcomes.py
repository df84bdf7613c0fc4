"""What became of each snapshot, told by the upload and by the service; each is lost at most once."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict

# Far more than can be on their way.
MAX_REMEMBERED = 256


class SnapshotOutcomes:
    """Shared by the threads of a courier."""

    def __init__(self) -> None:
        self._is_committed: OrderedDict[tuple[str, int, int], bool] = OrderedDict()
        self._changed = threading.Condition()

    def lose(self, session_id: str, epoch: int, step: int) -> bool:
        """Notes a loss; False if it is known already, so that nobody counts it twice."""
        return self._note((session_id, epoch, step), is_committed=False)

    def commit(self, session_id: str, epoch: int, step: int) -> bool:
        """Notes that the service has all ranks' parts; False if it is known already."""
        return self._note((session_id, epoch, step), is_committed=True)

    def _note(self, snapshot: tuple[str, int, int], *, is_committed: bool) -> bool:
        with self._changed:
            is_news = self._is_committed.get(snapshot) is not is_committed
            self._is_committed[snapshot] = is_committed
            if len(self._is_committed) > MAX_REMEMBERED:
                self._is_committed.popitem(last=False)
            self._changed.notify_all()
            return is_news

    def is_committed(self, session_id: str, epoch: int, step: int, timeout_s: float) -> bool:
        """Whether the service has a whole snapshot; waits so long to hear of it."""
        snapshot = (session_id, epoch, step)
        deadline_s = time.monotonic() + timeout_s
        with self._changed:
            while snapshot not in self._is_committed and (left_s := deadline_s - time.monotonic()) > 0:
                self._changed.wait(left_s)
            return self._is_committed.get(snapshot, False)
