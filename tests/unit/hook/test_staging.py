"""When a snapshot reaches the courier: at once from host memory, one boundary later from a device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sidecast.trainer.hook.messenger import FromHook
from sidecast.trainer.hook.slots import Slot, has_free, take_free
from sidecast.trainer.hook.staging import Stager
from sidecast.trainer.partitions import StalePartitionError
from sidecast.trainer.pipe.buffers import SharedBuffer
from sidecast.trainer.pipe.messages import Snapshot


class FakeCourier:
    """Takes what it is given, while it can be reached."""

    def __init__(self) -> None:
        self.slots = [Slot(index, SharedBuffer(f"slot-{index}", 8)) for index in range(2)]
        self.posted: list[FromHook] = []
        self.is_reachable = True

    def take_slot(self) -> Slot | None:
        return take_free(self.slots)

    def post(self, message: FromHook) -> bool:
        self.posted.append(message)
        return self.is_reachable


class FakePartition:
    def __init__(self) -> None:
        self.is_stale = self.is_interrupted = False
        self.streams: list[Any] = []

    def read(self, out: torch.Tensor, stream: Any) -> None:
        if self.is_stale:
            raise StalePartitionError("it moved")
        if self.is_interrupted:
            raise KeyboardInterrupt
        self.streams.append(stream)
        out.fill_(7.0)


class FakeStream:
    """A device whose copies are over when they are waited for."""

    def __init__(self) -> None:
        self.num_waits = 0

    def record_event(self) -> FakeStream:
        return self

    def synchronize(self) -> None:
        self.num_waits += 1


def stager_of(courier: FakeCourier, stream: FakeStream | None = None) -> Stager:
    return Stager(courier, None, stream)  # type: ignore[arg-type]


def stage(stager: Stager, partition: FakePartition, step: int = 10) -> str:
    return stager.stage(partition, step, 0, stager.take_slot(None))  # type: ignore[arg-type]


def test_from_host_memory_it_is_handed_over_at_once() -> None:
    courier, partition = FakeCourier(), FakePartition()
    stager = stager_of(courier)
    assert stage(stager, partition) == ""
    assert courier.posted == [Snapshot(slot=0, step=10, epoch=0)]
    assert stager.collect() == ""
    assert len(courier.posted) == 1


def test_from_a_device_it_is_handed_over_once_the_copy_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidecast.trainer.hook.staging._pin", lambda slot: False)
    courier, partition, stream = FakeCourier(), FakePartition(), FakeStream()
    stager = stager_of(courier, stream)
    assert stage(stager, partition) == ""
    assert partition.streams == [stream]
    assert (courier.posted, stream.num_waits) == ([], 0)
    assert stager.collect() == ""
    assert (courier.posted, stream.num_waits) == ([Snapshot(slot=0, step=10, epoch=0)], 1)
    assert stager.collect() == ""
    assert stream.num_waits == 1


def test_what_was_staged_last_is_handed_over_when_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidecast.trainer.hook.staging._pin", lambda slot: False)
    courier = FakeCourier()
    stager = stager_of(courier, FakeStream())
    stage(stager, FakePartition())
    stager.close()
    assert len(courier.posted) == 1


def test_without_a_free_slot_nothing_is_copied() -> None:
    courier, partition = FakeCourier(), FakePartition()
    stager = stager_of(courier)
    assert [stage(stager, partition, step) for step in (10, 20, 30)] == [
        "",
        "",
        "the courier has not sent the snapshots before",
    ]
    assert len(partition.streams) == 2


def test_tensors_that_moved_cost_a_snapshot_and_no_slot() -> None:
    courier, partition = FakeCourier(), FakePartition()
    partition.is_stale = True
    assert stage(stager_of(courier), partition) == "it moved"
    taken = [take_free(courier.slots), take_free(courier.slots)]
    assert None not in taken
    assert not has_free(courier.slots)


def test_an_interrupt_costs_no_slot_of_the_cells_that_train_on() -> None:
    courier, partition = FakeCourier(), FakePartition()
    partition.is_interrupted = True
    with pytest.raises(KeyboardInterrupt):
        stage(stager_of(courier), partition)
    assert None not in (take_free(courier.slots), take_free(courier.slots))


def test_tensors_that_stay_away_are_told_of_once_and_again_after_they_were_there(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A model whose vocabulary was resized in mid-run, say (transformers pull request 3519)."""
    courier, partition = FakeCourier(), FakePartition()
    stager = stager_of(courier)
    for is_stale in (True, False, True, True, True, False, True, True):
        partition.is_stale = is_stale
        stage(stager, partition)
        for slot in courier.slots:
            slot.free()
    said = "nothing is nowcasted as long as snapshots cannot be taken: it moved"
    assert [record.getMessage() for record in caplog.records] == [said, said]


def test_an_unreachable_courier_is_told_of() -> None:
    courier = FakeCourier()
    courier.is_reachable = False
    assert stage(stager_of(courier), FakePartition()) == "the courier cannot be reached"
