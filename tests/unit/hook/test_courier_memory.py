"""The memory that a rank shares with its courier: taken as a whole or not at all, and each slot in one hand only."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from sidecast.errors import ConfigError
from sidecast.manifest import ModelManifest
from sidecast.trainer.hook.courier_handle import CourierHandle
from sidecast.trainer.hook.messenger import Died
from sidecast.trainer.hook.slots import Slot
from sidecast.trainer.pipe.channel import Channel
from sidecast.trainer.pipe.messages import (
    TO_COURIER,
    Confirmed,
    Failed,
    Hello,
    Prediction,
    Release,
    Report,
    Sent,
    Snapshot,
    ToCourier,
    ToHook,
)
from tests.support.courier_harness import session, settings
from tests.support.hook_harness import PREDICTION

# Of 64 bytes.
MANIFEST = ModelManifest.from_shapes([("w", (16,))], {"model_type": "toy"})


def held_buffers() -> list[str]:
    """Names of the shared memory that this process has open."""
    names = []
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            names.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        except FileNotFoundError:
            # The listing's own.
            continue
    return sorted(name for name in names if name.startswith("/memfd:"))


@pytest.mark.parametrize("num_granted", [0, 1, 2])
def test_buffers_that_were_granted_are_given_back_when_one_is_not(
    monkeypatch: pytest.MonkeyPatch, num_granted: int
) -> None:
    granted: list[int] = []
    allocate = os.posix_fallocate

    def refuse(descriptor: int, offset: int, length: int) -> None:
        if len(granted) == num_granted:
            raise OSError(12, "Cannot allocate memory")
        granted.append(descriptor)
        allocate(descriptor, offset, length)

    before = held_buffers()
    monkeypatch.setattr("os.posix_fallocate", refuse)
    with pytest.raises(ConfigError, match="no memory for the nowcaster's"):
        Trainer()
    assert len(granted) == num_granted
    assert held_buffers() == before


# --- slots


class FakeProcess:
    """A courier process that is no more than its end of the channel."""

    def __init__(self, command: list[str], **_: Any) -> None:
        endpoint = socket.socket(fileno=os.dup(int(command[-1])))
        self.channel = Channel[ToHook, ToCourier](endpoint, TO_COURIER)

    def kill(self) -> None:
        self.channel.close()

    def wait(self, timeout: float | None = None) -> int:
        return -9


class Trainer(CourierHandle):
    """A rank's side, with two slots."""

    def __init__(self) -> None:
        super().__init__(settings("127.0.0.1:1", MANIFEST, [(0, 0, 16)]), session("s1"), num_slots=2)

    @property
    def courier(self) -> FakeProcess:
        """The one that is there now."""
        assert isinstance(self._process, FakeProcess)
        return self._process

    def hear(self, *messages: ToHook) -> list[type]:
        """The kinds of what is heard once the courier has said this."""
        for message in messages:
            self.courier.channel.send(message)
        return [type(message) for message in self.receive()]

    def take(self) -> Slot:
        """Takes one of the free slots."""
        slot = self.take_slot()
        assert slot is not None
        return slot

    def take_all(self) -> list[Slot]:
        """Takes slots until there is none."""
        taken = []
        while (slot := self.take_slot()) is not None:
            taken.append(slot)
            assert len(taken) < 10
        return taken


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Trainer]:
    monkeypatch.setattr("subprocess.Popen", FakeProcess)
    handle = Trainer()
    yield handle
    handle.close()


def snapshot(slot: Slot) -> Snapshot:
    return Snapshot(slot=slot.index, step=10, epoch=0)


def sent(slot: Slot) -> Sent:
    return Sent(slot=slot.index, step=10, seconds=0.1, num_bytes=64, reason="")


def test_a_slot_that_is_being_filled_when_the_courier_dies_is_not_handed_out_again(trainer: Trainer) -> None:
    trainer.start()
    posted, filled = trainer.take(), trainer.take()
    assert trainer.post(snapshot(posted))
    trainer.courier.kill()
    assert trainer.hear() == [Died]
    # What the dead one was to send is free, what is being filled is not.
    assert trainer.take_all() == [posted]
    posted.free()
    assert trainer.post(snapshot(filled))
    assert trainer.take_all() == [posted]
    posted.free()
    assert trainer.hear(sent(filled)) == [Sent]
    assert trainer.take_all() == trainer.slots


def test_a_slot_that_was_handed_over_is_free_once_its_courier_is_replaced(trainer: Trainer) -> None:
    trainer.start()
    for slot in trainer.take_all():
        assert trainer.post(snapshot(slot))
    assert trainer.take_all() == []
    trainer.courier.kill()
    assert trainer.hear() == [Died]
    assert trainer.take_all() == trainer.slots


def test_a_slot_that_was_given_back_unfilled_stays_free_when_the_courier_is_replaced(trainer: Trainer) -> None:
    trainer.start()
    for slot in trainer.take_all():
        slot.free()
    trainer.courier.kill()
    assert trainer.hear() == [Died]
    assert trainer.take_all() == trainer.slots


@pytest.mark.parametrize("obstacle", ["dead", "dead for good", "full", "none"])
def test_a_snapshot_that_cannot_be_posted_gives_its_slot_back_once(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch, obstacle: str
) -> None:
    if obstacle != "none":
        trainer.start()
    slot = trainer.take()
    if obstacle == "full":
        monkeypatch.setattr(Channel, "post", lambda *_, **__: False)
    elif obstacle != "none":
        trainer.courier.kill()
    if obstacle == "dead for good":
        monkeypatch.setattr("sidecast.trainer.hook.courier_handle.MAX_DEATHS_IN_A_ROW", 0)
    assert not trainer.post(snapshot(slot))
    assert trainer.is_alive == (obstacle in ("dead", "full"))
    assert trainer.take_all() == trainer.slots


def test_what_a_dead_courier_had_said_is_not_taken_for_its_successors_words(trainer: Trainer) -> None:
    trainer.start()
    slot = trainer.take()
    assert trainer.post(snapshot(slot))
    trainer.log({"step": 10})
    dead = trainer.courier
    for message in (Failed(step=10, reason=""), sent(slot), Confirmed()):
        dead.channel.send(message)
    heard = trainer.receive()
    assert isinstance(next(heard), Failed)
    dead.kill()
    # Whoever hears a message may answer, and so be the one who notices the death.
    trainer.post(Report(outcome="rejected", version=1, step=10, epoch=0))
    assert trainer.courier is not dead
    assert [type(message) for message in heard] == [Died]
    assert trainer._unconfirmed
    assert trainer.hear(Confirmed()) == []
    assert not trainer._unconfirmed
    assert trainer.take_all() == trainer.slots


def test_a_courier_of_another_version_costs_a_courier_and_not_the_run(
    trainer: Trainer, caplog: pytest.LogCaptureFixture
) -> None:
    trainer.start()
    other = trainer.courier
    for message in (Failed(step=10, reason=""), Snapshot(slot=0, step=10, epoch=0)):
        other.channel.send(message)  # type: ignore[arg-type]
    assert trainer.hear() == [Failed, Died]
    assert "the courier is not of the hook's version: a message is of kind 'Snapshot'" in caplog.text
    assert trainer.courier is not other
    assert trainer.num_deaths == 1


def test_a_courier_is_told_what_holds_now_and_what_was_not_confirmed(trainer: Trainer) -> None:
    def told() -> list[ToCourier]:
        trainer.courier.channel.set_blocking(False)
        return list(trainer.courier.channel.receive())

    trainer.start()
    (first,) = told()
    assert isinstance(first, Hello)
    assert (first.session.session_id, first.prediction_is_held, len(first.slot_descriptors)) == ("s1", False, 2)
    assert trainer.hear(PREDICTION) == [Prediction]
    assert trainer.held == PREDICTION
    trainer.new_session(session("s2"))
    trainer.courier.kill()
    assert trainer.hear() == [Died]
    (second,) = told()
    assert second == replace(first, session=session("s2"), prediction_is_held=True)
    trainer.release_prediction({"action": "applied", "step": 24})
    trainer.courier.kill()
    assert trainer.hear() == [Died]
    # It is the hook's no longer, but still to be recorded.
    assert told() == [second, Release(record={"action": "applied", "step": 24})]
