"""When a snapshot reaches the courier: at once from host memory, one boundary later from a device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from sidecast.trainer.hook.staging import Stager
from sidecast.trainer.partitions import StalePartitionError
from sidecast.trainer.pipe.buffers import SharedBuffer


class FakeCourier:
    """Takes what it is given, while it can be reached."""

    def __init__(self) -> None:
        self.slots = [SharedBuffer(f"slot-{index}", 8) for index in range(2)]
        self.free = [0, 1]
        self.posted: list[Mapping[str, Any]] = []
        self.is_reachable = True

    def take_slot(self) -> int | None:
        return self.free.pop() if self.free else None

    def return_slot(self, slot: int) -> None:
        self.free.append(slot)

    def post(self, message: Mapping[str, Any]) -> bool:
        self.posted.append(message)
        return self.is_reachable


class FakePartition:
    def __init__(self) -> None:
        self.is_stale = False
        self.streams: list[Any] = []

    def read(self, out: torch.Tensor, stream: Any) -> None:
        if self.is_stale:
            raise StalePartitionError("it moved")
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
    return Stager(courier, stream)  # type: ignore[arg-type]


def stage(stager: Stager, partition: FakePartition, step: int = 10) -> str:
    return stager.stage(partition, step, 0, stager._courier.take_slot())  # type: ignore[arg-type]


def test_from_host_memory_it_is_handed_over_at_once() -> None:
    courier, partition = FakeCourier(), FakePartition()
    stager = stager_of(courier)
    assert stage(stager, partition) == ""
    assert courier.posted == [{"type": "snapshot", "slot": 1, "step": 10, "epoch": 0}]
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
    assert ([message["step"] for message in courier.posted], stream.num_waits) == ([10], 1)
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
    assert len(courier.free) == 2


def test_an_unreachable_courier_is_told_of() -> None:
    courier = FakeCourier()
    courier.is_reachable = False
    assert stage(stager_of(courier), FakePartition()) == "the courier cannot be reached"
