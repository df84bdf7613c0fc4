"""What a service goes on with after another one has died: what that one has recorded, and nothing else."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sidecast.nowcaster_service.keeping.run_folder import folder_name, key_of
from sidecast.nowcaster_service.keeping.sealed import FORMAT, read_sealed, write_sealed
from sidecast.protos import nowcast_pb2 as pb
from sidecast.protos.transport import RUN_SECRET_KEY
from sidecast.protos.version import PROTOCOL_VERSION
from tests.support.services.calls import next_event, refusal, status
from tests.support.services.dead import OWN, SECRET, as_if_killed, begin, fetched, published, send, watch
from tests.support.services.harness import (
    MANIFEST,
    RunningService,
    join_request,
    open_request,
    rank_bytes,
    state,
)

OTHER = "fedcba9876543210" * 2
NUM_BYTES = 4 * MANIFEST.num_elements


def run_folder(folder: Path) -> Path:
    (record,) = folder.glob("vectors/*/*/record")
    return record.parent


def test_history_and_prediction_are_there_again(left: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), RunningService(left) as service:
        begin(service)
        item = status(service)
        assert (list(item.history_steps), item.num_committed, item.num_published) == ([20, 30], 3, 1)
        event = published(service, 20)
        assert (event.version, event.epoch) == (1, 0)
        for rank in (0, 1):
            assert fetched(service, rank, 1) == rank_bytes(state(20) - state(10), rank)
        send(service, 40)
        published(service, 40)
        assert fetched(service, 0, 2) == rank_bytes(state(40) - state(30), 0)
        assert service.store.used_bytes == 3 * NUM_BYTES
        assert "goes on after a restart, with the snapshots of steps [20, 30]" in caplog.text


@pytest.mark.parametrize("missing", [["is_paused"], ["is_paused", "probe", "probe_points", "best"]])
def test_a_record_of_an_earlier_version_is_gone_on_with(left: Path, missing: list[str]) -> None:
    record = run_folder(left) / "record"
    content = read_sealed(record).content
    for name in missing:
        del content[name]
    write_sealed(record, content, key_of(SECRET, "run"))
    with RunningService(left) as service:
        begin(service)
        assert list(status(service).history_steps) == [20, 30]


# --- what is refused


def cut(folder: Path) -> None:
    path = folder / "record"
    path.write_bytes(path.read_bytes()[:-100])


def alter(folder: Path) -> None:
    path = folder / "record"
    path.write_bytes(path.read_bytes().replace(b'"settled_version":-1', b'"settled_version":-2'))


def make_older(folder: Path) -> None:
    path = folder / "record"
    path.write_bytes(path.read_bytes().replace(FORMAT, b"sidecast history, format 0"))


def seal_with_another_key(folder: Path) -> None:
    write_sealed(folder / "record", read_sealed(folder / "record").content, key_of(OTHER, "run"))


def seal_for_another_run(folder: Path) -> None:
    write_sealed(folder / "record", read_sealed(folder / "record").content, key_of(SECRET, "another"))


def add_a_field(folder: Path) -> None:
    content = read_sealed(folder / "record").content | {"later": 1}
    write_sealed(folder / "record", content, key_of(SECRET, "run"))


def point_elsewhere(folder: Path) -> None:
    content = read_sealed(folder / "record").content
    content["states"][0]["file"] = "../stolen.f32"
    write_sealed(folder / "record", content, key_of(SECRET, "run"))


def file_of(folder: Path, index: int) -> Path:
    content = json.loads((folder / "record").read_bytes().split(b"\n")[1])
    names = [*(item["file"] for item in content["states"]), content["prediction"]["file"]]
    return folder / names[index]


def flip_a_bit(index: int) -> Callable[[Path], None]:
    def flip(folder: Path) -> None:
        data = bytearray(file_of(folder, index).read_bytes())
        data[-1] ^= 1
        file_of(folder, index).write_bytes(data)

    return flip


def truncate(folder: Path) -> None:
    with file_of(folder, 0).open("r+b") as file:
        file.truncate(NUM_BYTES - 4)


def swap(folder: Path) -> None:
    first, second = file_of(folder, 0), file_of(folder, 1)
    first.rename(folder / "between")
    second.rename(first)
    (folder / "between").rename(second)


def link(folder: Path) -> None:
    path = file_of(folder, 0)
    path.rename(folder.parent / "outside")
    path.symlink_to(folder.parent / "outside")


def record_of_another_run(folder: Path) -> None:
    folder.rename(folder.with_name(f"{folder_name('another')}-000000001"))


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "record-cut": (cut, "the record is torn or altered"),
    "record-altered": (alter, "the record is torn or altered"),
    "older": (make_older, "the record begins with 'sidecast history, format 0'; allowed: 'sidecast history, format 1'"),
    "another-secrets-key": (seal_with_another_key, "the record is sealed with another key than this run's"),
    "another-runs-key": (seal_for_another_run, "the record is sealed with another key than this run's"),
    "later": (
        add_a_field,
        "the record is not one of this version: ValueError: its fields are averages, best, carry",
    ),
    "elsewhere": (point_elsewhere, "the record is not one of this version: ValueError: its files are"),
    "state-altered": (flip_a_bit(1), "is not the state of step 30 any more, from byte 145596 on"),
    "prediction-altered": (flip_a_bit(-1), "is not what it was when it was made"),
    "state-cut": (truncate, f"has {NUM_BYTES - 4} bytes, not {NUM_BYTES}"),
    "state-gone": (lambda folder: file_of(folder, 0).unlink(), "cannot be opened: No such file or directory"),
    "states-swapped": (swap, "is not the state of step"),
    "a-link": (link, "cannot be opened: Too many levels of symbolic links"),
}


@pytest.mark.parametrize("what", list(REFUSED))
def test_what_is_not_what_was_recorded_is_refused_and_said(
    left: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    tamper, words = REFUSED[what]
    tamper(run_folder(left))
    with RunningService(left) as service:
        begin(service)
        assert list(status(service).history_steps) == []
        assert service.store.used_bytes == 0
        for rank in (0, 1):
            event = next_event(watch(service, rank), "failed")
            assert event.reason.startswith("the history begins anew: ")
            assert words in event.reason
        assert f"run run: the history begins anew: {event.reason.partition(': ')[2]}" in caplog.text
        # Of the files that were left there is none, and the run goes on.
        assert list(service.store.folder.rglob("*.f32")) == []
        for step in (40, 50, 60):
            send(service, step)
        published(service, 60)
        # It is told once.
        assert next(watch(service)).WhichOneof("event") == "published"
        assert fetched(service, 0, 3) == rank_bytes(state(60) - state(50), 0)


def test_a_record_in_the_folder_of_another_run_is_nobodys(left: Path) -> None:
    record_of_another_run(run_folder(left))
    with RunningService(left) as service:
        begin(service)
        assert list(status(service).history_steps) == []
        begin(service, "t1", run_id="another")
        event = next_event(watch(service, session_id="t1"), "failed")
        assert "the record is one of run run, and lies in" in event.reason


def test_another_secret_is_refused_and_the_owner_goes_on(left: Path) -> None:
    with RunningService(left) as service:
        for metadata in (((RUN_SECRET_KEY, OTHER),), ()):
            request = open_request(protocol_version=PROTOCOL_VERSION if metadata else 0)
            code, text = refusal(lambda: service.stub.Open(request, metadata=metadata))  # noqa: B023
            assert (code.name, text[:20]) == ("PERMISSION_DENIED", "run run is protected")
        begin(service)
        assert list(status(service).history_steps) == [20, 30]


def test_the_session_is_the_same_or_it_begins_anew(left: Path) -> None:
    with RunningService(left) as service:
        begin(service, max_relative_norm=0.25)
        assert list(status(service).history_steps) == []
        reason = next_event(watch(service), "failed").reason
        assert reason == "the history begins anew: the session was opened as something else"
        assert service.store.used_bytes == 0


# --- the run's next session


def test_a_run_that_is_resumed_after_the_restart_adopts_what_its_checkpoint_knows(left: Path) -> None:
    with RunningService(left) as service:
        begin(service, "s2", resumed=True, resume_step=25)
        assert list(status(service).history_steps) == [20]
        assert published(service, 20, "s2").version == 1
        assert fetched(service, 1, 1, "s2") == rank_bytes(state(20) - state(10), 1)
        assert service.store.used_bytes == 2 * NUM_BYTES
        code, text = refusal(begin, service, "s1")
        assert (code.name, "superseded" in text) == ("FAILED_PRECONDITION", True)
        again = as_if_killed(service, left.parent / "third")
    with RunningService(again) as service:
        # Also after another restart, before and after the later session is back.
        for _ in range(2):
            code, text = refusal(begin, service, "s1")
            assert (code.name, "superseded" in text) == ("FAILED_PRECONDITION", True)
            begin(service, "s2", resumed=True, resume_step=25)
        assert list(status(service).history_steps) == [20]


PUSH = {"push": pb.Push(time_constant_steps=9.0), "period_steps": 10}


@pytest.mark.parametrize(("before", "after"), [({}, PUSH), (PUSH, {}), (PUSH, {**PUSH, "max_relative_norm": 0.1})])
def test_a_run_that_is_resumed_as_another_one_adopts_nothing(
    tmp_path: Path, before: dict[str, Any], after: dict[str, Any]
) -> None:
    with RunningService(tmp_path / "first") as first:
        begin(first, **before)
        send(first, 10)
        left = as_if_killed(first, tmp_path / "second")
    with RunningService(left) as service:
        begin(service, "s2", resumed=True, resume_step=15, **after)
        assert list(status(service).history_steps) == []
        assert service.store.used_bytes == 0


def test_a_run_that_was_settled_is_not_given_the_same_once_more(left: Path, tmp_path: Path) -> None:
    with RunningService(left) as service:
        begin(service)
        service.stub.Report(pb.ReportRequest(session_id="s1", version=1, outcome="REJECTED"), metadata=OWN)
        again = as_if_killed(service, tmp_path / "third")
    with RunningService(again) as service:
        begin(service, "s2", resumed=True, resume_step=35)
        _, text = refusal(fetched, service, 0, 1, "s2")
        assert text == "version 1 is not published; published: none"
        assert list(status(service).history_steps) == [20, 30]


def test_a_jump_ends_what_is_recorded_of_the_epoch_before(left: Path, tmp_path: Path) -> None:
    with RunningService(left) as service:
        begin(service)
        service.stub.Report(pb.ReportRequest(session_id="s1", version=1, outcome="APPLIED", epoch=1), metadata=OWN)
        again = as_if_killed(service, tmp_path / "third")
    with RunningService(again) as service:
        begin(service)
        item = status(service)
        assert (list(item.history_steps), item.epoch) == ([], 1)


def test_a_run_that_begins_anew_adopts_nothing(left: Path) -> None:
    with RunningService(left) as service:
        begin(service, "fresh")
        assert list(status(service).history_steps) == []
        assert list(service.store.folder.rglob("*.f32")) == []
        assert service.servicer.sessions._watchers._losses == {}


def test_a_run_without_a_secret_leaves_nothing_that_could_be_used(tmp_path: Path) -> None:
    with RunningService(tmp_path / "first") as first:
        first.stub.Open(open_request())
        for rank in (0, 1):
            first.stub.Join(join_request(rank))
        send(first, 10)
        assert list(tmp_path.rglob("record")) == []
        left = as_if_killed(first, tmp_path / "second")
    with RunningService(left) as service:
        assert list(service.store.folder.rglob("*.f32")) == []
