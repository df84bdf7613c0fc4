"""What the probe has said of one session: a state machine without engines, files or clocks of its own.

Once a snapshot is in all read-outs that take it, these and a copy of the snapshot itself are evaluated together, so
that all losses of a step are of the same states and tokens. Of the snapshots that are committed meanwhile the newest is
next, so that a run's last one is never left out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sidecast.nowcaster_service.probing.best import Best, BestKept
from sidecast.nowcaster_service.read_outs.average import Average
from sidecast.nowcaster_service.session_events import Event, ProbeEvent
from sidecast.nowcaster_service.session_settings import SessionSettings
from sidecast.nowcaster_service.vector_store import VectorFile

log = logging.getLogger(__name__)

MAX_POINTS = 200
"""Of a run; where there are more, the one goes whose neighbours are nearest to each other."""


@dataclass(frozen=True, kw_only=True)
class ProbePoint:
    """The losses of one step.

    Attributes:
        step: Of the newest state in what was evaluated.
        losses: By read-out, and ``raw``; one that was not finite is missing.
    """

    step: int
    losses: Mapping[str, float]

    @property
    def best(self) -> str:
        """Whose loss is the lowest."""
        return min(self.losses, key=lambda name: (self.losses[name], name))


@dataclass(frozen=True, kw_only=True)
class ProbeTask:
    """What is to be evaluated; its files are pinned until ``ProbeLosses.finish``."""

    step: int
    averages: Mapping[str, Average]


class ProbeLosses:
    """The losses of one session.

    Args:
        settings: Of the session.
        notify: Called with every ProbeEvent.

    Attributes:
        points: Oldest first.
        best: What is kept of what was evaluated.
        fault: What went wrong with the last one; empty for nothing.
    """

    def __init__(self, settings: SessionSettings, notify: Callable[[Event], None]) -> None:
        self.points: list[ProbePoint] = []
        self.best = BestKept(settings.keep_best)
        self.fault = settings.probe_fault
        self._settings = settings
        self._notify = notify
        self._task: ProbeTask | None = None
        self._has_worker = False
        self._newest_step = 0
        self._is_given_up = not settings.probe
        self._is_closed = False
        self._said: set[str] = set()

    def wants(self, step: int) -> bool:
        """Whether a snapshot is to be evaluated."""
        return step > self._newest_step and self._task is None and not self._is_given_up

    def begin(self, step: int, averages: Mapping[str, Average]) -> None:
        """Takes what is to be evaluated, for ``claim`` to hand out."""
        assert self._task is None
        for average in averages.values():
            average.vector.pin()
        self._task = ProbeTask(step=step, averages=averages)

    def claim(self) -> ProbeTask | None:
        """What is to be evaluated and nobody does yet, to be ended with ``finish``."""
        if self._task is None or self._has_worker:
            return None
        self._has_worker = True
        return self._task

    def finish(
        self, task: ProbeTask, losses: Mapping[str, float], fault: str = "", *, is_hopeless: bool = False
    ) -> list[VectorFile]:
        """Takes the result.

        Args:
            task: What was to be done.
            losses: By name; empty if there are none.
            fault: What went wrong; empty for nothing.
            is_hopeless: Whether it would go wrong again, so that this session is not evaluated any more.

        Returns:
            Files to be unpinned once no record names them.
        """
        is_point = bool(losses) and not is_hopeless and not self._is_closed
        dropped = self.best.offer(task.averages, losses) if is_point else []
        for average in task.averages.values():
            average.vector.unpin()
        self._task, self._has_worker, self._newest_step = None, False, task.step
        self._is_given_up |= is_hopeless
        if fault and fault not in self._said:
            self._said.add(fault)
            log.warning("run %s, probe of step %d: %s", self._settings.run_id, task.step, fault)
        self.fault = fault
        if is_point:
            self.points.append(ProbePoint(step=task.step, losses=dict(losses)))
            if len(self.points) > MAX_POINTS:
                self._drop_nearest()
        self._notify(ProbeEvent(task.step, dict(losses), fault))
        return dropped

    def restore(self, points: Sequence[ProbePoint], best: Sequence[Best], step: int | None = None) -> None:
        """Goes on with what the probe has said of the run before.

        Args:
            points: Oldest first.
            best: What was kept, with its pins.
            step: What is beyond it is left out; None: nothing is.
        """
        self.best.restore(best, step)
        self.points = [point for point in points if step is None or point.step <= step]
        self._newest_step = self.points[-1].step if self.points else 0

    def adopt(self, earlier: ProbeLosses, step: int) -> None:
        """Takes over what the same probe has said of a resumed run's earlier session, up to its checkpoint's step."""
        self.restore(earlier.points, earlier.best.release(), step)

    def close(self) -> None:
        """Lets go of what is kept, and keeps nothing more."""
        self._is_closed = True
        for item in self.best.release():
            item.average.vector.unpin()

    def _drop_nearest(self) -> None:
        inner = range(1, len(self.points) - 1)
        del self.points[min(inner, key=lambda i: self.points[i + 1].step - self.points[i - 1].step)]

    def at(self, step: int, name: str) -> float | None:
        """The loss of what a name stands for at a step, if that was the last one that was evaluated."""
        newest = self.points[-1] if self.points else None
        return newest.losses.get(name) if newest is not None and newest.step == step else None
