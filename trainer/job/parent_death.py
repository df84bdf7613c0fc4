"""Ending with the process that started us, also when it is killed."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def die_with_parent(signal_number: int = signal.SIGTERM) -> None:
    """Asks the kernel to signal this process when its parent ends; does nothing where it is not Linux.

    The launcher ends its ranks when it is asked to end, but a launcher that is killed leaves them training.
    """
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(signal_number), 0, 0, 0)
    if os.getppid() != parent:
        # It ended before the kernel knew that we care.
        os.kill(os.getpid(), signal_number)
