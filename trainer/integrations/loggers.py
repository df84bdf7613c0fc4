"""What a run's own loggers show of nowcasting: numbers, told on the one rank on which loggers write."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from sidecast.errors import one_line
from sidecast.trainer.hook.attachment import Hook
from sidecast.trainer.hook.reporting import NowcastEvent

log = logging.getLogger(__name__)

# Of a summary, what says how a run fares; a replay knows of some only.
_NUMBERS = (
    "num_applied",
    "num_accepted",
    "num_rolled_back",
    "num_rejected",
    "num_failed",
    "num_dropped",
    "num_losses",
    "blocked_s",
    "suspended",
)
# Each follows another event, or changes no number.
_QUIET = ("staged", "connected", "disconnected", "rollback_delayed")


def numbers_of(hook: Hook) -> dict[str, float]:
    """What was done since the hook was attached, and how long training has waited for it.

    Args:
        hook: Of the run.

    Returns:
        Numbers of the summary under its names, each behind ``sidecast/``.
    """
    summary = hook.summary()
    return {f"sidecast/{name}": float(summary[name]) for name in _NUMBERS if name in summary}


def log_numbers(hook: Hook, write: Callable[[dict[str, float]], Any]) -> None:
    """Has the numbers written at every event that changes them.

    Args:
        hook: Of the run, on the rank on which loggers write.
        write: Takes what ``numbers_of`` gives.
    """

    is_told = False

    def write_changed(event: NowcastEvent) -> None:
        nonlocal is_told
        if event.kind in _QUIET:
            return
        try:
            write(numbers_of(hook))
        except Exception as error:
            # On this rank alone: the others would wait for it for ever.
            if not is_told:
                log.warning("nowcasting's numbers cannot be logged: %s", one_line(error))
            is_told = True

    hook.add_listener(write_changed)
