"""An engine that outlives its service writes to nothing that a later service has taken over, whenever it comes."""

from __future__ import annotations

import fcntl
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sidecast.errors import ConfigError
from sidecast.manifest import ModelManifest
from sidecast.nowcaster_service import pushing, vector_files
from sidecast.nowcaster_service.access.callers import Caller
from sidecast.nowcaster_service.dispatch import push_request
from sidecast.nowcaster_service.keeping.checksums import MAX_PIECES, packed_checksums
from sidecast.nowcaster_service.keeping.examination import examine
from sidecast.nowcaster_service.keeping.run_folder import RunFolder, folder_name, key_of, recorder_of
from sidecast.nowcaster_service.keeping.sealed import RecordError, read_sealed
from sidecast.nowcaster_service.pushing import PushRequest, make_push
from sidecast.nowcaster_service.session import Session
from sidecast.nowcaster_service.session_events import PushTask
from sidecast.nowcaster_service.vector_files import written_alone
from sidecast.nowcaster_service.vector_store import RECORD_NAME, HistoryStore
from sidecast.policies.push import PushConfig
from sidecast.protos import nowcast_pb2 as pb
from sidecast.protos.codec import vector_digest
from sidecast.protos.shards import ShardSpec
from tests.support.services.dead import SECRET, examined, push_settings, reopened, send_state

MANIFEST = ModelManifest.from_shapes([("w", (6,))], {"model_type": "toy"})
PUSH = PushConfig(interval_steps=10, start_step=0)


@pytest.fixture
def store(tmp_path: Path) -> HistoryStore:
    return HistoryStore(tmp_path, 1 << 20)


@pytest.fixture
def request_(store: HistoryStore) -> PushRequest:
    """What an engine has been told to do when its service dies."""
    settings = push_settings(MANIFEST, PUSH)
    folder = RunFolder(store, store.new_folder(folder_name("run")))
    recorder = recorder_of(folder, settings, pb.OpenRequest(), Caller(secret=SECRET), [])
    session = Session(settings, folder, lambda event: None, recorder)
    session.join(0, [ShardSpec(0, 0, 6)], [ShardSpec(0, 0, 6)])
    assert send_state(session, 10, np.arange(6)) is None
    task = send_state(session, 20, np.arange(6) ** 2)
    assert isinstance(task, PushTask)
    return push_request(settings, task, session.note(task))


def held(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("*.f32"))]


def test_one_that_begins_later_finds_nothing(store: HistoryStore, request_: PushRequest) -> None:
    (folder,) = reopened(store).left
    before = held(folder)
    with pytest.raises(ConfigError, match="is gone: the service that wrote it has ended"):
        make_push(request_)
    assert held(folder) == before


def test_one_that_has_opened_its_files_and_not_begun_finds_nothing(
    store: HistoryStore, request_: PushRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[Path] = []
    num_locked = 0

    def lock_late(descriptor: int, operation: int) -> None:
        nonlocal num_locked
        num_locked += 1
        if num_locked == 2:
            left.extend(reopened(store).left)
        fcntl.flock(descriptor, operation)

    monkeypatch.setattr(vector_files, "fcntl", _Fcntl(lock_late))
    with (
        pytest.raises(ConfigError, match="is gone: the service that wrote it has ended"),
        written_alone(request_.before_path, request_.delta_path),
    ):
        pass
    found = examined(left[0], "run")
    assert found.push is not None
    assert found.push.is_untouched


class _Fcntl:
    LOCK_EX, LOCK_NB = fcntl.LOCK_EX, fcntl.LOCK_NB

    def __init__(self, flock: Any) -> None:
        self.flock = flock


def test_one_that_is_at_work_is_waited_for(store: HistoryStore, request_: PushRequest) -> None:
    with written_alone(request_.before_path, request_.delta_path):
        (folder,) = reopened(store).left
        sealed = read_sealed(folder / RECORD_NAME)
        with pytest.raises(RecordError, match=f"an engine still writes to {request_.before_path.name} after 0 s"):
            examine(folder, sealed, key_of(SECRET, "run"), 0.0)
    assert examined(folder, "run").push is not None


def test_two_engines_never_write_to_the_same_file(request_: PushRequest) -> None:
    with (
        written_alone(request_.before_path),
        pytest.raises(ConfigError, match="is being written to by somebody else"),
    ):
        make_push(request_)


def test_what_it_has_made_before_it_was_looked_at_counts(store: HistoryStore, request_: PushRequest) -> None:
    made = make_push(request_)
    (folder,) = reopened(store).left
    found = examined(folder, "run")
    assert found.push is not None
    assert (found.push.carry_file, found.push.carry_digest) == (request_.before_path.name, made.carry_digest)
    assert not found.push.is_untouched


def test_an_average_is_not_written_over_where_its_note_finds_no_folder(
    store: HistoryStore, request_: PushRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The service dies, and the next one moves the folder away, while the engine averages."""
    left: list[Path] = []

    def digest(vector: memoryview) -> int:
        left.extend(reopened(store).left)
        return vector_digest(vector)

    monkeypatch.setattr(pushing, "vector_digest", digest)
    with pytest.raises(ConfigError, match="is gone: the service that wrote it has ended"):
        make_push(request_)
    (folder,) = left
    # Of a run that begins, the average so far is zeros.
    assert not np.fromfile(folder / request_.delta_path.name, np.float32).any()
    assert examined(folder, "run").lost.startswith("the interval up to step 20 is left out")


def test_a_push_that_travels_in_bf16_is_rounded_while_its_file_is_the_engines(request_: PushRequest) -> None:
    make_push(replace(request_, rounds_to_bf16=True))
    assert (np.fromfile(request_.delta_path, np.uint32) & 0xFFFF == 0).all()


def test_a_state_in_very_many_pieces_is_not_recorded() -> None:
    pieces = [(start, 1, 0) for start in range(MAX_PIECES + 1)]
    assert packed_checksums(pieces[:-1], MAX_PIECES)
    assert packed_checksums(pieces, MAX_PIECES + 1) == b""


def test_a_note_of_another_attempt_says_nothing(store: HistoryStore, request_: PushRequest) -> None:
    """The average looks whole, and is not known to be."""
    assert request_.note is not None
    make_push(request_)
    with request_.note.path.open("r+b") as file:
        content = bytearray(file.read())
        at = content.rindex(b"\n", 0, -1) + 1
        content[at] = ord("0") if content[at] != ord("0") else ord("1")
        file.seek(0)
        file.write(content)
    (folder,) = reopened(store).left
    found = examined(folder, "run")
    assert found.push is not None
    # The average was to begin: there is none before.
    assert (found.push.carry_file, found.push.factor, found.push.is_untouched) == (None, None, False)
    assert found.lost.startswith("the interval up to step 20 is left out")


def test_an_average_that_is_not_the_noted_one_is_not_used(store: HistoryStore, request_: PushRequest) -> None:
    make_push(request_)
    data = bytearray(request_.before_path.read_bytes())
    data[0] ^= 1
    request_.before_path.write_bytes(data)
    (folder,) = reopened(store).left
    found = examined(folder, "run")
    assert found.push is not None
    assert (found.push.carry_file, found.push.factor, found.push.is_untouched) == (None, None, False)


def test_a_lock_goes_with_its_process(request_: PushRequest) -> None:
    child = os.fork()
    if child == 0:
        with written_alone(request_.before_path):
            os.kill(os.getpid(), 9)
    os.waitpid(child, 0)
    make_push(request_)
