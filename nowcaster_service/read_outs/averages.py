"""The read-outs of one session: a state machine without engines, files or clocks of its own.

Every committed snapshot goes into every read-out, one read-out after another. Each new average is written beside the
one before, which is given back once the record names the new one: so all of them are whole at every moment. A snapshot
that is committed while the one before is still being averaged is left out; its steps are the next one's then.

Where the run is probed, a snapshot is copied, too, as if into an average that gives it all the weight: the snapshot
itself may be overwritten before it has been evaluated.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from sidecast.nowcaster_service.errors import MalformedError, SaturatedError, WrongStateError
from sidecast.nowcaster_service.probing.losses import ProbeLosses
from sidecast.nowcaster_service.read_outs.average import Average
from sidecast.nowcaster_service.read_outs.folding import FoldAnswer
from sidecast.nowcaster_service.session_events import Event, FoldEvent
from sidecast.nowcaster_service.session_settings import SessionSettings
from sidecast.nowcaster_service.snapshots import Snapshot
from sidecast.nowcaster_service.vector_store import VectorFile, Vectors
from sidecast.policies.read_outs import RAW, ReadOut

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FoldTask:
    """One state to be averaged into one read-out; its files are pinned until ``RunningAverages.finish``.

    Attributes:
        read_out: Which one.
        snapshot: The state.
        before: The average so far; None if the state is its first.
        begin_step: Of the new average.
        out: To be overwritten with the new average.
    """

    read_out: ReadOut
    snapshot: Snapshot
    before: Average | None
    begin_step: int
    out: VectorFile

    @property
    def share(self) -> float:
        """Weight of the state."""
        before_step = self.begin_step if self.before is None else self.before.step
        return self.read_out.share(self.begin_step, before_step, self.snapshot.step)


class RunningAverages:
    """The read-outs of one session.

    Args:
        settings: Of the session.
        vectors: Where vectors come from.
        notify: Called with every FoldEvent.

    Attributes:
        averages: By name; a read-out that has seen no state yet is missing.
        raw: Copy of the newest state that was to be evaluated; None for none.
        probe: What they are worth.
    """

    def __init__(self, settings: SessionSettings, vectors: Vectors, notify: Callable[[Event], None]) -> None:
        self.averages: dict[str, Average] = {}
        self.raw: Average | None = None
        self.probe = ProbeLosses(settings, notify)
        self._settings = settings
        self._vectors = vectors
        self._notify = notify
        # That is being averaged, and the read-outs that it is still to go into.
        self._snapshot: Snapshot | None = None
        self._left: list[ReadOut] = []
        self._has_worker = False
        self._is_given_up = False

    @property
    def step_in_progress(self) -> int | None:
        """Of the snapshot that is being averaged; None for none."""
        return None if self._snapshot is None else self._snapshot.step

    def take(self, snapshot: Snapshot) -> None:
        """Lets a committed snapshot go into all read-outs that it is new to, or leaves it out."""
        if self._is_given_up:
            return
        wanting = [read_out for read_out in self._settings.read_outs if self._wants(read_out, snapshot.step)]
        if self._snapshot is None and self.probe.wants(snapshot.step):
            wanting.append(RAW)
        if self._snapshot is not None:
            for read_out in wanting:
                reason = f"the state of step {self._snapshot.step} was still being averaged"
                self._notify(FoldEvent(read_out.name, snapshot.step, reason))
            return
        if wanting:
            self._snapshot, self._left = snapshot, wanting
            snapshot.vector.pin()

    def take_raw(self, snapshot: Snapshot) -> None:
        """Lets the newest snapshot be evaluated, where others were while it came."""
        if self._is_given_up or not self.probe.wants(snapshot.step):
            return
        if self._snapshot is None:
            self._snapshot, self._left = snapshot, [RAW]
            snapshot.vector.pin()
        elif self._snapshot is snapshot and RAW not in self._left:
            self._left.append(RAW)

    def _wants(self, read_out: ReadOut, step: int) -> bool:
        average = self.averages.get(read_out.name)
        return step > read_out.start_step and (average is None or step > average.step)

    @property
    def needs_vector(self) -> bool:
        """Whether ``next`` will ask for a vector."""
        return self._snapshot is not None and bool(self._left)

    def claim(self) -> bool:
        """Whether there is work that nobody does yet; whoever asks does it, by ``next`` until that has no more."""
        is_claimed = self._snapshot is not None and not self._has_worker
        self._has_worker |= is_claimed
        return is_claimed

    def next(self) -> FoldTask | None:
        """What an engine has to do now, to be ended with ``finish``; None once there is nothing left."""
        while self._snapshot is not None and self._left:
            read_out, step = self._left.pop(0), self._snapshot.step
            try:
                out = self._vectors.create(self._settings.manifest.num_elements)
            except SaturatedError as error:
                self._tell(read_out, step, str(error))
                continue
            before = None if read_out is RAW else self.averages.get(read_out.name)
            if before is not None:
                before.vector.pin()
            return FoldTask(
                read_out=read_out,
                snapshot=self._snapshot,
                before=before,
                begin_step=self._begin_step(step) if before is None else before.begin_step,
                out=out,
            )
        if self._snapshot is not None:
            self._begin_probe(self._snapshot.step)
        self._release()
        self._has_worker = False
        return None

    def _begin_probe(self, step: int) -> None:
        if self.raw is not None and self.raw.step == step and self.probe.wants(step):
            averages = {name: average for name, average in self.averages.items() if average.step == step}
            self.probe.begin(step, averages | {RAW.name: self.raw})

    def _begin_step(self, step: int) -> int:
        return max(0, step - self._settings.snapshot_interval_steps)

    def finish(self, task: FoldTask, answer: FoldAnswer) -> VectorFile | None:
        """Takes the result.

        Args:
            task: What was to be done.
            answer: What came of it.

        Returns:
            The vector that is not needed any more, to be given back once no record names it.
        """
        name, before = task.read_out.name, task.before
        if before is not None:
            before.vector.unpin()
        is_raw = task.read_out is RAW
        is_known = (is_raw or self.averages.get(name) is before) and self._snapshot is task.snapshot
        if answer.refusal:
            # An engine that was given up on may still be writing to it.
            task.out.forbid_reuse()
        if answer.refusal or not is_known:
            if is_known:
                log.warning("the state of step %d is not in %s: %s", task.snapshot.step, name, answer.refusal)
                self._tell(task.read_out, task.snapshot.step, answer.refusal)
            return task.out
        average = Average(
            vector=task.out,
            digest=answer.digest,
            begin_step=task.begin_step,
            step=task.snapshot.step,
            num_snapshots=1 + (0 if before is None else before.num_snapshots),
        )
        if is_raw:
            before, self.raw = self.raw, average
        else:
            self.averages[name] = average
        self._tell(task.read_out, task.snapshot.step)
        return None if before is None else before.vector

    def _tell(self, read_out: ReadOut, step: int, reason: str = "") -> None:
        if read_out is not RAW:
            self._notify(FoldEvent(read_out.name, step, reason))

    def get(self, name: str) -> Average:
        """A read-out as it is now.

        Raises:
            MalformedError: The run has none of that name.
            WrongStateError: It has seen no state yet.
        """
        average = self.raw if name == RAW.name else self.averages.get(name)
        if (best := self.probe.best.find(name)) is not None:
            average = best.average
        if average is None:
            names = [read_out.name for read_out in self._settings.read_outs] + [RAW.name] * bool(self._settings.probe)
            names += self.probe.best.names
            if name not in names:
                kept = ", ".join(names) or "none (nowcaster.read_outs)"
                raise MalformedError(f"the read-out is {name[:100]!r}; this run keeps: {kept}")
            raise WrongStateError(f"the read-out {name} has seen no state yet")
        return average

    def adopt(self, earlier: dict[str, Average], step: int) -> None:
        """Takes over the averages of a resumed run's earlier session that hold no state beyond the checkpoint.

        A state that is being averaged there goes into none.

        Args:
            earlier: The earlier session's; what is taken over is taken out.
            step: Optimizer steps applied in the checkpoint.
        """
        for name in [read_out.name for read_out in self._settings.read_outs if read_out.name in earlier]:
            if earlier[name].step <= step:
                self.averages[name] = earlier.pop(name)
            else:
                log.warning(
                    "the read-out %s of run %s begins anew: it holds states up to step %d, and the run goes on from %d",
                    name,
                    self._settings.run_id,
                    earlier[name].step,
                    step,
                )

    def adopt_or_drop(self, earlier: dict[str, Average], step: int) -> None:
        """The same, and gives back what is not taken over."""
        self.adopt(earlier, step)
        for average in earlier.values():
            average.vector.delete()

    def close(self) -> None:
        """Gives all space back."""
        self._left.clear()
        for average in self.averages.values():
            average.vector.delete()
        self.averages.clear()
        if self.raw is not None:
            self.raw.vector.delete()
            self.raw = None
        self.probe.close()
        self._release()

    def give_up(self) -> None:
        """Takes no more states: what there is stays, and can be had."""
        self._is_given_up = True
        self._left.clear()

    def _release(self) -> None:
        if self._snapshot is not None:
            self._snapshot.vector.unpin()
            self._snapshot = None
