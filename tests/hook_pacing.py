"""Keeps a run whose steps take no time from outrunning its courier."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sidecast.trainer.nowcast.events import NowcastEvent


def pace(hook: Any, events: list[Any], period_steps: int) -> Callable[[NowcastEvent], None]:
    """A listener that notes events, and waits after each snapshot until it is committed or lost.

    Not at base steps: there the hook itself waits in sync mode, and must be the one to hear that a nowcast failed.
    """

    def listen(event: NowcastEvent) -> None:
        events.append((event.kind, event.step))
        if event.kind != "staged" or event.step % period_steps == 0:
            return
        num_known = sum(kind in ("committed", "dropped") for kind, _ in events)
        while sum(kind in ("committed", "dropped") for kind, _ in events) == num_known:
            hook._inbox.poll(1.0)

    return listen
