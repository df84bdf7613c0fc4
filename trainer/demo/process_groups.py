"""Ending a process together with everything that it started in its process group."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

POLL_INTERVAL_S = 0.05
# The leader first and alone: it knows best in which order its own children should end.
LEADER_GRACE_S = 15.0
GROUP_GRACE_S = 5.0


def end_group(group: int, reap: Callable[[], object] = lambda: None) -> None:
    """Ends a process group: its leader is asked, then everyone in it, then everyone is killed.

    Args:
        group: Id of the group, which is its leader's process id.
        reap: Collects the leader's exit status, if it has ended and is a child of ours; without that it would
            look alive for ever.
    """
    for send, grace_s in ((os.kill, LEADER_GRACE_S), (os.killpg, GROUP_GRACE_S)):
        deadline_s = time.monotonic() + grace_s
        alive = _send(send, group, signal.SIGTERM)
        while alive and time.monotonic() < deadline_s:
            time.sleep(POLL_INTERVAL_S)
            reap()
            alive = _send(send, group, 0)
    _send(os.killpg, group, signal.SIGKILL)


def _send(send: Callable[[int, int], None], target: int, number: int) -> bool:
    try:
        send(target, number)
    except ProcessLookupError:
        return False
    return True
