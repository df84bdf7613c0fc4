"""Vector files: their budget, and which of them may serve again."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from mmap import mmap
from pathlib import Path

import pytest

from sidecast.nowcaster_service import vector_store
from sidecast.nowcaster_service.errors import SaturatedError
from sidecast.nowcaster_service.vector_store import FP32_BYTES, MAX_SPARES, HistoryStore
from tests.support.limits import HANG_S

NUM_ELEMENTS = 1000
VECTOR_BYTES = NUM_ELEMENTS * FP32_BYTES


@pytest.fixture
def store(tmp_path: Path) -> HistoryStore:
    return HistoryStore(tmp_path / "vectors", 10 * VECTOR_BYTES)


def num_files(store: HistoryStore) -> int:
    return len(list(store.folder.iterdir()))


def test_a_deleted_file_serves_the_next_vector_of_its_size(store: HistoryStore) -> None:
    first = store.create(NUM_ELEMENTS)
    first.delete()
    assert store.used_bytes == 0
    assert store.create(NUM_ELEMENTS // 2).path != first.path
    assert store.create(NUM_ELEMENTS).path == first.path
    assert store.used_bytes == VECTOR_BYTES + VECTOR_BYTES // 2


def test_a_pinned_file_waits_for_its_reader(store: HistoryStore) -> None:
    vector = store.create(NUM_ELEMENTS)
    vector.pin()
    vector.delete()
    assert store.create(NUM_ELEMENTS).path != vector.path
    vector.unpin()
    assert store.create(NUM_ELEMENTS).path == vector.path


def test_a_file_that_a_lost_engine_may_still_write_never_serves_again(store: HistoryStore) -> None:
    vector = store.create(NUM_ELEMENTS)
    vector.forbid_reuse()
    vector.delete()
    assert not vector.path.exists()
    assert store.create(NUM_ELEMENTS).path != vector.path


def test_spares_are_few_and_never_stand_in_the_way(store: HistoryStore) -> None:
    for vector in [store.create(NUM_ELEMENTS) for _ in range(6)]:
        vector.delete()
    assert num_files(store) == MAX_SPARES
    large = store.create(9 * NUM_ELEMENTS)
    # One spare still fits beside it.
    assert num_files(store) == 2
    with pytest.raises(SaturatedError, match="does not fit: 36000 of 40000 bytes"):
        store.create(2 * NUM_ELEMENTS)
    large.delete()
    store.drop_spares()
    assert num_files(store) == 0


class GatedAllocation:
    """Stands in for ``map_new_file``: each file waits for the test.

    Attributes:
        has_begun: Released for each file that is asked for.
        may_go_on: To be released for each.
    """

    def __init__(self) -> None:
        self.has_begun, self.may_go_on = threading.Semaphore(0), threading.Semaphore(0)
        self._map_new_file = vector_store.map_new_file

    def __call__(self, path: Path, num_bytes: int) -> mmap:
        self.has_begun.release()
        assert self.may_go_on.acquire(timeout=HANG_S)
        return self._map_new_file(path, num_bytes)

    async def begun(self) -> None:
        """Returns once another file is being allocated; the event loop goes on meanwhile."""
        assert await asyncio.to_thread(self.has_begun.acquire, timeout=HANG_S)


@pytest.fixture
def allocation(monkeypatch: pytest.MonkeyPatch) -> Iterator[GatedAllocation]:
    gated = GatedAllocation()
    monkeypatch.setattr(vector_store, "map_new_file", gated)
    yield gated
    gated.may_go_on.release(10)


def test_a_prepared_vector_is_allocated_beside_the_loop_once_for_all_who_ask(
    store: HistoryStore, allocation: GatedAllocation
) -> None:
    async def prepare() -> None:
        asking = [asyncio.create_task(store.prepare(NUM_ELEMENTS)) for _ in range(2)]
        await allocation.begun()
        asking[0].cancel()
        allocation.may_go_on.release()
        assert await asking[1]
        assert asking[0].cancelled()
        # It is there: nothing takes time.
        assert not await store.prepare(NUM_ELEMENTS)

    asyncio.run(prepare())
    assert num_files(store) == 1
    assert store.used_bytes == 0
    vector = store.create(NUM_ELEMENTS)
    assert store.used_bytes == VECTOR_BYTES
    assert len(vector.view) == VECTOR_BYTES
    assert num_files(store) == 1


def test_what_is_prepared_counts_against_the_budget(store: HistoryStore, allocation: GatedAllocation) -> None:
    async def prepare() -> None:
        first = asyncio.create_task(store.prepare(6 * NUM_ELEMENTS))
        await allocation.begun()
        assert not await store.prepare(5 * NUM_ELEMENTS)
        allocation.may_go_on.release(2)
        assert await first
        # A spare makes room for it.
        assert await store.prepare(5 * NUM_ELEMENTS)

    asyncio.run(prepare())
    assert num_files(store) == 1
    store.create(5 * NUM_ELEMENTS)
    with pytest.raises(SaturatedError):
        store.create(6 * NUM_ELEMENTS)


def test_a_vector_that_is_ready_after_its_run_has_ended_is_removed(
    store: HistoryStore, allocation: GatedAllocation
) -> None:
    folder = store.new_folder("run")

    async def prepare() -> bool:
        asking = asyncio.create_task(store.prepare(NUM_ELEMENTS, folder))
        await allocation.begun()
        # What removes it is at work still.
        kept = store._remove
        store._remove = lambda work: None
        store.remove_folder(folder)
        store._remove = kept
        allocation.may_go_on.release()
        return await asking

    assert asyncio.run(prepare()) is False
    assert list(folder.iterdir()) == []


def test_without_room_on_the_disk_only_creating_fails(store: HistoryStore, tmp_path: Path) -> None:
    nowhere = tmp_path / "gone"
    assert asyncio.run(store.prepare(NUM_ELEMENTS, nowhere)) is False
    with pytest.raises(SaturatedError, match="no room for 4000 bytes at"):
        store.create(NUM_ELEMENTS, nowhere)
