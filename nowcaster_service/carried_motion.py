"""What a session with pushes carries from one snapshot to the next: the last state, and the average own motion.

Four vectors in all: the state that is received, the last one, the average, and the published push. The new average is
written over the state before, piece by piece, and the push over the average so far: so one of the two averages is whole
at every moment, whatever dies.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from sidecast.nowcaster_service.errors import SaturatedError
from sidecast.nowcaster_service.session_events import Prediction, PushTask
from sidecast.nowcaster_service.session_settings import SessionSettings
from sidecast.nowcaster_service.snapshots import Snapshot
from sidecast.nowcaster_service.vector_store import VectorFile, Vectors

NONCE_BYTES = 16


@dataclass(frozen=True)
class Carry:
    """An average own motion.

    Attributes:
        vector: Its values.
        digest: Of them; see ``vector_digest``.
    """

    vector: VectorFile
    digest: int


class CarriedMotion:
    """The carried state of one session.

    Args:
        settings: Of the session; it has pushes.
        vectors: Where vectors come from.

    Attributes:
        base: The last committed snapshot, with which the next interval begins; None if there is none.
        carry: The average own motion; None if there is none, or while an engine works on it.
    """

    def __init__(self, settings: SessionSettings, vectors: Vectors) -> None:
        self.base: Snapshot | None = None
        self.carry: Carry | None = None
        self._settings = settings
        self._vectors = vectors

    def is_due(self, step: int) -> bool:
        """Whether the run may wait for a push from the snapshot of this step."""
        return self._settings.push is not None and self._settings.push.is_active(step)

    def advance(self, snapshot: Snapshot, published: Prediction | None) -> PushTask | str:
        """Ends an interval with a committed snapshot, which begins the next one.

        Args:
            snapshot: The snapshot; no push is being made.
            published: The newest published push, if there is one.

        Returns:
            What an engine has to do, to be ended with ``end``; or why there is nothing to be done.
        """
        base, self.base = self.base, snapshot
        if base is None:
            return "the run's motion is known from the next snapshot on"
        applied = self._applied_between(base, snapshot, published)
        if applied is None:
            base.vector.delete()
            return f"what was applied since the snapshot of step {base.step} is not known here"
        carry, self.carry = self.carry, None
        try:
            delta = self._vectors.create(self._settings.manifest.num_elements) if carry is None else carry.vector
        except SaturatedError as error:
            base.vector.delete()
            return str(error)
        assert base.motion is not None, "committed"
        assert snapshot.motion is not None, "committed"
        return PushTask(
            version=snapshot.step // self._settings.period_steps,
            base_step=snapshot.step,
            epoch=snapshot.epoch,
            horizon_intervals=1,
            states=(snapshot.vector,),
            delta=delta,
            before=base,
            carry_digest=0 if carry is None else carry.digest,
            begins=carry is None,
            applied=applied[0],
            applied_weight=applied[1],
            num_steps=snapshot.step - base.step,
            learning_rate_sum=snapshot.motion.learning_rate_sum - base.motion.learning_rate_sum,
            nonce=secrets.token_hex(NONCE_BYTES),
        )

    def _applied_between(
        self, base: Snapshot, snapshot: Snapshot, published: Prediction | None
    ) -> tuple[VectorFile | None, float] | None:
        """What was added to the weights between two snapshots, and with which factor; None if that is not known."""
        if snapshot.epoch == base.epoch:
            return None, 0.0
        assert snapshot.motion is not None, "committed"
        is_published = (
            published is not None
            and published.task.base_step == base.step
            and published.task.version == snapshot.motion.applied_version
        )
        if snapshot.epoch != base.epoch + 1 or published is None or not is_published:
            return None
        return published.task.delta, snapshot.motion.applied_weight

    def adopt(self, earlier: CarriedMotion, step: int, epoch: int) -> Snapshot | None:
        """Takes over what a resumed run's earlier session carries, if that lies on the run's way to its checkpoint.

        Args:
            earlier: The earlier session's.
            step: Optimizer steps applied in the checkpoint.
            epoch: The run's epoch in the checkpoint.

        Returns:
            The snapshot with which the next interval begins; None if nothing is taken over.
        """
        base = earlier.base
        if base is None or base.step > step or not 0 <= epoch - base.epoch <= 1:
            return None
        self.base, earlier.base = base, None
        self.carry, earlier.carry = earlier.carry, None
        return base

    def close(self) -> None:
        """Gives the average's space back; snapshots are the session's."""
        if self.carry is not None:
            self.carry.vector.delete()
            self.carry = None
