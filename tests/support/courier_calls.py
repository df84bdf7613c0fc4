"""What a test has a rank do with its courier: stage states, hear of a prediction, apply it."""

from __future__ import annotations

from sidecast.trainer.hook.courier_handle import CourierHandle
from sidecast.trainer.hook.messenger import ForHook
from sidecast.trainer.pipe.messages import Committed, Prediction, Sent, Snapshot
from tests.support.courier_harness import until
from tests.support.services.harness import state


def stage(courier: CourierHandle, seed: int, step: int, epoch: int = 0) -> None:
    slot = courier.take_slot()
    assert slot is not None
    slot.buffer.view[:] = state(seed).tobytes()
    assert courier.post(Snapshot(slot=slot.index, step=step, epoch=epoch))


def predicted(courier: CourierHandle, epoch: int = 0, first_step: int = 10) -> Prediction:
    stage(courier, 1, first_step, epoch)
    assert until(courier, Sent).reason == ""
    stage(courier, 2, first_step + 10, epoch)
    return until(courier, Prediction)


def settled(courier: CourierHandle) -> Sent:
    """Waits until a snapshot is sent and committed, whichever is heard of first."""
    seen: list[ForHook] = []
    sent = until(courier, Sent, seen)
    assert sent.reason == ""
    if not any(isinstance(message, Committed) for message in seen):
        until(courier, Committed)
    return sent


def applied(step: int) -> dict[str, object]:
    return {"action": "applied", "step": step, "weight": 0.5}
