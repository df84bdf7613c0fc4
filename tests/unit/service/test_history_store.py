"""Vector files: their budget, and which of them may serve again."""

from __future__ import annotations

from pathlib import Path

import pytest

from sidecast.nowcaster_service.errors import SaturatedError
from sidecast.nowcaster_service.vector_store import FP32_BYTES, MAX_SPARES, HistoryStore

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
