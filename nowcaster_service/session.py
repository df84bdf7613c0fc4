"""What the service knows of one training run: a state machine without sockets, threads or clocks.

``Receiving`` has what it takes in; here is what becomes of it: nowcasts, what is published, and what goes on in a later
session, or after a restart of the service.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from sidecast.nowcaster_service.assembly import RankPlan
from sidecast.nowcaster_service.carried_motion import CarriedMotion, Carry
from sidecast.nowcaster_service.errors import SaturatedError, WrongStateError
from sidecast.nowcaster_service.keeping.kept_state import KeptState, record_of
from sidecast.nowcaster_service.keeping.run_folder import Note, Recorder
from sidecast.nowcaster_service.probing.losses import ProbeTask
from sidecast.nowcaster_service.read_outs.averages import FoldTask, RunningAverages
from sidecast.nowcaster_service.read_outs.folding import FoldAnswer
from sidecast.nowcaster_service.receiving import Receiving
from sidecast.nowcaster_service.session_events import Event, FailureEvent, NowcastTask, Prediction, PushTask
from sidecast.nowcaster_service.session_settings import SessionSettings
from sidecast.nowcaster_service.snapshots import Snapshot, SnapshotState
from sidecast.nowcaster_service.vector_store import VectorFile, Vectors
from sidecast.protos import nowcast_pb2 as pb


class Session(Receiving):
    """One attach of one training run.

    Args:
        settings: What rank 0 announced.
        vectors: Where vectors come from.
        notify: Called with every SnapshotEvent, Prediction and FailureEvent.
        recorder: Writes down what a later service is to go on with; None: nothing.

    Attributes:
        prediction: The published one.
        recorder: The same.
        read_outs: Averages of the states so far.
        is_paused: Whether the run is to apply nothing.
        num_pause_changes: How often that has changed here.
    """

    def __init__(
        self,
        settings: SessionSettings,
        vectors: Vectors,
        notify: Callable[[Event], None],
        recorder: Recorder | None = None,
    ) -> None:
        super().__init__(settings, vectors, notify)
        self.prediction: Prediction | None = None
        self.recorder = recorder
        self.is_paused, self.num_pause_changes = False, 0
        self.read_outs = RunningAverages(settings, vectors, notify)
        self._motion = None if settings.push is None else CarriedMotion(settings, vectors)
        # How many services have begun the nowcast that is being made.
        self._num_tries = 0
        # The newest prediction that the run has reported on.
        self._settled_version = -1
        # The session of a resumed run that goes on with the nowcast that is being made here.
        self._successor: Session | None = None
        self._dropped: list[VectorFile] = []

    # --- predicting

    def needs_vector(self, request: pb.CommitRequest) -> bool:
        """Whether a commit makes a nowcast due, for which there is no vector yet."""
        if self._is_closed or not self.completes(request):
            return False
        if self._motion is None:
            return request.step % self.settings.period_steps == 0
        return self.settings.makes_pushes and self._motion.base is not None and self._motion.carry is None

    def _due(self, snapshot: Snapshot) -> NowcastTask | None:
        self.read_outs.take(snapshot)
        return self._due_nowcast(snapshot.step) if self._motion is None else self._due_push(snapshot, self._motion)

    def _due_nowcast(self, step: int) -> NowcastTask | None:
        settings = self.settings
        if step % settings.period_steps != 0:
            return None
        window = settings.window(step)
        missing = [item for item in window if item not in self._snapshots]
        if missing:
            self.fail(step, f"the window lacks the snapshots of steps {missing}")
            return None
        if self._nowcast is not None:
            # A queue of nowcasts, each holding a window on disk, would outgrow what was budgeted at Open.
            self.fail(step, f"the nowcast of step {self._nowcast.base_step} is still being made")
            return None
        try:
            delta = self._vectors.create(settings.manifest.num_elements)
        except SaturatedError as error:
            # The snapshot is committed all the same: its commit must not be refused for the prediction's sake.
            self.fail(step, str(error))
            return None
        task = NowcastTask(
            version=step // settings.period_steps,
            base_step=step,
            epoch=self.epoch,
            horizon_intervals=settings.horizon_at(step),
            states=tuple(self._snapshots[item].vector for item in window),
            delta=delta,
        )
        return self._begin(task)

    def _due_push(self, snapshot: Snapshot, motion: CarriedMotion) -> NowcastTask | None:
        if motion.base is not None:
            del self._snapshots[motion.base.step]
        if not self.settings.makes_pushes:
            if motion.base is not None:
                self._drop(motion.base.vector)
            motion.base = snapshot
            return None
        task = motion.advance(snapshot, self.prediction)
        if isinstance(task, str):
            if motion.is_due(snapshot.step):
                self.fail(snapshot.step, task)
            return None
        return self._begin(task)

    def _begin(self, task: NowcastTask) -> NowcastTask:
        self._nowcast = task
        self._num_tries += 1
        for vector in task.held_files:
            vector.pin()
        return task

    def finish(
        self, task: NowcastTask, prediction: Prediction | None, reason: str = "", *, carry_digest: int = 0
    ) -> None:
        """Takes a nowcast's result: publishes the prediction, or counts the failure. A push may come to nothing.

        Args:
            task: What was to be made.
            prediction: The result.
            reason: Why there is none, where something went wrong.
            carry_digest: Of a run with pushes: of its new average.
        """
        if self._successor is not None:
            self._successor.finish(task, prediction, reason, carry_digest=carry_digest)
            return
        self._nowcast, self._num_tries = None, 0
        if reason:
            # An engine that was given up on may still be reading the states and writing its delta.
            for vector in (*task.held_files, *task.written_files):
                vector.forbid_reuse()
        for vector in task.held_files:
            vector.unpin()
        if self._motion is not None and isinstance(task, PushTask):
            if reason or self._is_closed:
                # The average may be half written, or is being written to still.
                self._drop(task.before.vector)
            else:
                self._motion.carry = Carry(task.before.vector, carry_digest)
        if prediction is None or self._is_closed:
            self._drop(task.delta)
            self.record()
            if reason or self._motion is None or self._motion.is_due(task.base_step):
                self.fail(task.base_step, reason or "there is nothing to apply")
            return
        if self.prediction is not None:
            self._drop(self.prediction.task.delta)
        self.prediction = prediction
        self.counts.published += 1
        # Before anybody can hear of it: what ranks may have applied is known here after a restart, too.
        self.record()
        self._notify(prediction)

    def _work_in_progress(self) -> str:
        if self._nowcast is not None:
            return f"the push of step {self._nowcast.base_step} is"
        step = self.read_outs.step_in_progress
        return "" if step is None else f"the read-outs of step {step} are"

    def finish_fold(self, task: FoldTask, answer: FoldAnswer) -> None:
        """Takes a new average; see ``RunningAverages.finish``."""
        unused = self.read_outs.finish(task, answer)
        if unused is not None:
            self._drop(unused)
        self.record()

    def finish_probe(self, task: ProbeTask, losses: Mapping[str, float], fault: str, *, is_hopeless: bool) -> None:
        """Takes what the probe has said; see ``ProbeLosses.finish``."""
        dropped = self.read_outs.probe.finish(task, losses, fault, is_hopeless=is_hopeless)
        # A snapshot that is on its way would be committed in the middle, and a push write over what is copied.
        if self.history_steps and not any(item.state is SnapshotState.RECEIVING for item in self._snapshots.values()):
            self.read_outs.take_raw(self._snapshots[self.history_steps[-1]])
        self.record()
        for vector in dropped:
            vector.unpin()

    def settle(self, version: int) -> None:
        """Takes note that the run has decided about a prediction: no resume brings it, or an earlier one, back."""
        if version > self._settled_version:
            self._settled_version = version
            self.record()

    def pause(self, is_paused: bool) -> bool:
        """Asks the run to apply nothing, or to go on; says whether that is news."""
        if is_paused == self.is_paused:
            return False
        self.is_paused = is_paused
        self.num_pause_changes += 1
        # Before anybody hears of it: what ranks may heed is known here after a restart, too.
        self.record()
        return True

    def fail(self, base_step: int, reason: str) -> None:
        """Counts a nowcast that was not made."""
        self.counts.failed += 1
        self._notify(FailureEvent(base_step, reason))

    def fetch_plan(self, rank: int, version: int) -> tuple[RankPlan, Prediction]:
        """What a rank may read of the published prediction.

        Raises:
            WrongStateError: That version is not, or no longer, published.
        """
        self._check_rank(rank)
        prediction = self.prediction
        if prediction is None or prediction.task.version != version:
            current = "none" if prediction is None else f"version {prediction.task.version}"
            raise WrongStateError(f"version {version} is not published; published: {current}")
        return self._ranks.fetch_plan(rank), prediction

    # --- from one service to the next

    def record(self) -> None:
        if self.recorder is not None and not self._is_closed:
            kept = KeptState(
                epoch=self.epoch,
                counts=self.counts,
                settled_version=self._settled_version,
                last_ended_step=self._last_ended_step,
                snapshots=tuple(self._snapshots[step] for step in self.history_steps),
                prediction=self.prediction,
                carry=None if self._motion is None else self._motion.carry,
                task=self._nowcast,
                num_tries=self._num_tries,
                averages=dict(self.read_outs.averages),
                is_paused=self.is_paused,
                probe=self.settings.probe,
                probe_points=tuple(self.read_outs.probe.points),
                best=tuple(self.read_outs.probe.best.items),
            )
            self.recorder.write(record_of(kept, self.recorder.identity))
        for vector in self._dropped:
            vector.delete()
        self._dropped.clear()

    def _drop(self, vector: VectorFile) -> None:
        if self.recorder is None:
            vector.delete()
        else:
            self._dropped.append(vector)

    def note(self, task: PushTask) -> Note | None:
        """Where the engine that makes a push notes that the new average is whole; None: nowhere."""
        if self._successor is not None:
            return self._successor.note(task)
        return None if self.recorder is None else self.recorder.note(task.nonce)

    def restore(self, kept: KeptState) -> NowcastTask | None:
        """Goes on where a session was when its service died.

        Args:
            kept: What was recorded of it.

        Returns:
            The nowcast that was being made then, to be made once more.
        """
        self.epoch, self.counts, self.prediction = kept.epoch, kept.counts, kept.prediction
        self._settled_version, self._last_ended_step = kept.settled_version, kept.last_ended_step
        self._snapshots = {snapshot.step: snapshot for snapshot in kept.snapshots}
        self._num_tries = kept.num_tries
        self.read_outs.averages.update(kept.averages)
        self.read_outs.probe.restore(kept.probe_points, kept.best)
        if self._motion is not None:
            # The oldest: a second one is the end of an interval whose push is made again.
            self._motion.base = min(kept.snapshots, key=lambda item: item.step, default=None)
            self._motion.carry = kept.carry
        task = kept.task
        if task is not None:
            self._begin(task)
        elif kept.again_step is not None:
            task = self._due(self._snapshots[kept.again_step])
        if task is None:
            # What could not be begun again has failed; the next one was not tried yet.
            self._num_tries = 0
        self._take_newest()
        self.record()
        return task

    def _take_newest(self) -> None:
        """Averages the newest state that was taken over, where that had not been done."""
        if self.history_steps and self.read_outs.step_in_progress is None:
            self.read_outs.take(self._snapshots[self.history_steps[-1]])

    # --- from one session of a run to the next

    def adopt(self, earlier: Session, step: int, epoch: int) -> None:
        """Takes over what a resumed run's earlier session has of one epoch, up to a step.

        The snapshots; and a prediction that the run has not decided about, or that is still being made, if its base
        is among them.
        """
        self.epoch = epoch
        # A copy: the earlier session may still count the end of a nowcast.
        self.counts = replace(earlier.counts)
        if earlier.settings.manifest.schema_hash == self.settings.manifest.schema_hash:
            self.read_outs.adopt(earlier.read_outs.averages, step)
            if self.settings.probe == earlier.settings.probe:
                self.read_outs.probe.adopt(earlier.read_outs.probe, step)
        self._adopt_history(earlier, step, epoch)
        self._take_newest()

    def _adopt_history(self, earlier: Session, step: int, epoch: int) -> None:
        is_other_model = earlier.settings.manifest.schema_hash != self.settings.manifest.schema_hash
        if is_other_model or (self._motion is None) != (earlier._motion is None):
            return
        predicts_alike = self.settings.predicts_like(earlier.settings)
        if self._motion is None or earlier._motion is None:
            for known in list(earlier._snapshots):
                snapshot = earlier._snapshots[known]
                if snapshot.state is SnapshotState.COMMITTED and snapshot.epoch == epoch and known <= step:
                    self._snapshots[known] = earlier._snapshots.pop(known)
            oldest_step, kept_epoch, settled_version = 0, epoch, earlier._settled_version
        else:
            base = self._motion.adopt(earlier._motion, step, epoch) if predicts_alike else None
            if base is None:
                return
            self._snapshots[base.step] = earlier._snapshots.pop(base.step)
            # Also one that was applied: it is to be taken out of the motion since.
            oldest_step, kept_epoch, settled_version = base.step, base.epoch, -1

        def is_kept(task: NowcastTask) -> bool:
            is_alike = predicts_alike and task.epoch == kept_epoch and task.version > settled_version
            return is_alike and oldest_step <= task.base_step <= step

        if earlier.prediction is not None and is_kept(earlier.prediction.task):
            self.prediction, earlier.prediction = earlier.prediction, None
        if earlier._nowcast is not None and is_kept(earlier._nowcast):
            self._nowcast, earlier._successor = earlier._nowcast, self
            self._num_tries = earlier._num_tries

    def close(self) -> None:
        """Refuses everything from now on and gives all space back."""
        self._is_closed = True
        self.read_outs.close()
        if self._motion is not None:
            self._motion.close()
        for snapshot in self._snapshots.values():
            snapshot.vector.delete()
        self._snapshots.clear()
        self._ranks.forget_shared()
        if self.prediction is not None:
            self.prediction.task.delta.delete()
            self.prediction = None
