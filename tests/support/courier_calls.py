"""What a test has a rank do with its courier: stage states, hear of a prediction, apply it."""

from __future__ import annotations

from sidecast.trainer.hook.courier_handle import CourierHandle
from sidecast.trainer.pipe.messages import Message
from tests.support.courier_harness import until
from tests.support.service_harness import state


def stage(courier: CourierHandle, seed: int, step: int, epoch: int = 0) -> None:
    slot = courier.take_slot()
    assert slot is not None
    courier.slots[slot].view[:] = state(seed).tobytes()
    assert courier.post({"type": "snapshot", "slot": slot, "step": step, "epoch": epoch})


def predicted(courier: CourierHandle, epoch: int = 0, first_step: int = 10) -> dict[str, object]:
    stage(courier, 1, first_step, epoch)
    assert until(courier, "sent")["reason"] == ""
    stage(courier, 2, first_step + 10, epoch)
    return dict(until(courier, "prediction"))


def settled(courier: CourierHandle) -> Message:
    """Waits until a snapshot is sent and committed, whichever is heard of first."""
    seen: list[Message] = []
    sent = until(courier, "sent", seen)
    assert sent["reason"] == ""
    if not any(message["type"] == "committed" for message in seen):
        until(courier, "committed")
    return sent


def applied(step: int) -> dict[str, object]:
    return {"action": "applied", "step": step, "weight": 0.5}
