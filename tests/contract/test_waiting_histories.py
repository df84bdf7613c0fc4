"""Histories that nobody has asked for yet, those that cannot be recorded, and those that services die of."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sidecast.nowcaster_service import app
from sidecast.nowcaster_service.keeping import kept_runs
from sidecast.nowcaster_service.keeping.run_folder import forget
from sidecast.protos.version import PROTOCOL_VERSION
from tests.support.limits import HANG_S
from tests.support.services.calls import next_event, refusal, status
from tests.support.services.dead import SECRET, as_if_killed, begin, published, send, watch
from tests.support.services.harness import MANIFEST, RunningService, open_request

NUM_BYTES = 4 * MANIFEST.num_elements


def test_a_service_that_is_stopped_in_order_leaves_the_history_to_the_next(tmp_path: Path) -> None:
    with RunningService(tmp_path) as first:
        begin(first)
        send(first, 10)
    with RunningService(tmp_path) as second:
        begin(second)
        assert list(status(second).history_steps) == [10]


def test_what_nobody_asks_for_expires(left: Path) -> None:
    with RunningService(left) as service:
        assert len(list(service.store.folder.rglob("*.f32"))) == 3
        service.clock.now_s += 61
        service.expire_sessions()
        assert list(service.store.folder.rglob("*")) == [service.servicer.handover.path]


def test_what_is_left_keeps_its_room_for_a_while(left: Path) -> None:
    needed_bytes = (2 + 5) * NUM_BYTES
    with RunningService(left, history_budget_bytes=needed_bytes + 2 * NUM_BYTES) as service:
        other = {"session_id": "t1", "run_id": "other"}
        code, text = refusal(service.stub.Open, open_request(**other))
        assert code.name == "RESOURCE_EXHAUSTED"
        assert f"{3 * NUM_BYTES} of {9 * NUM_BYTES} bytes are promised to others" in text
        service.clock.now_s += 31
        service.stub.Open(open_request(**other))
        assert list(service.store.folder.rglob("*.f32")) == []


def test_who_asks_twice_while_it_is_being_read_is_answered_twice(left: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a courier whose first call took too long."""
    examine, num_examined = kept_runs.examine, []
    have_both_asked = threading.Event()

    def examine_late(*args: Any) -> Any:
        num_examined.append(1)
        assert have_both_asked.wait(HANG_S)
        return examine(*args)

    monkeypatch.setattr(kept_runs, "examine", examine_late)
    with RunningService(left) as service, ThreadPoolExecutor(2) as pool:
        kept = service.servicer.sessions.kept
        ask, num_asked = kept.examine, []

        async def counted(*args: Any) -> None:
            num_asked.append(1)
            if len(num_asked) == 2:
                have_both_asked.set()
            await ask(*args)

        monkeypatch.setattr(kept, "examine", counted)
        for answer in [pool.submit(begin, service) for _ in range(2)]:
            answer.result(HANG_S)
        assert len(num_examined) == 1
        assert list(status(service).history_steps) == [20, 30]


def test_a_full_disk_costs_the_record_and_no_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with RunningService(tmp_path) as service:
        begin(service)
        send(service, 10)
        assert len(list(tmp_path.rglob("record"))) == 1
        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_bytes", full)
            send(service, 20)
            send(service, 30)
        # What it said is not true any more.
        assert list(tmp_path.rglob("record*")) == []
        assert caplog.text.count("the history of run run would not survive a restart: ") == 1
        assert status(service).num_committed == 3
        send(service, 40)
        assert len(list(tmp_path.rglob("record"))) == 1


def test_a_nowcast_that_two_services_have_died_of_is_given_up(tmp_path: Path) -> None:
    folder = tmp_path / "0"
    with RunningService(folder) as service:
        begin(service)
        service.engines.may_finish.clear()
        send(service, 10)
        send(service, 20)
        folder = as_if_killed(service, tmp_path / "1")
    with RunningService(folder, before_start=lambda servicer: servicer._engines.may_finish.clear()) as service:
        begin(service)
        while not service.engines.requests:
            status(service)
        folder = as_if_killed(service, tmp_path / "2")
    with RunningService(folder) as service:
        begin(service)
        reason = next_event(watch(service), "failed").reason
        assert reason == "2 services have ended while the nowcast of step 20 was being made"
        assert list(status(service).history_steps) == [10, 20]
        assert service.engines.requests == []
        send(service, 30)
        send(service, 40)
        published(service, 40)


def test_what_was_read_and_not_taken_expires_too(left: Path) -> None:
    """As when a job ends while its history is being read."""
    with RunningService(left) as service:
        request = open_request(session_id="s1", protocol_version=PROTOCOL_VERSION)
        service.call(service.servicer.sessions.kept.examine(request, SECRET))
        service.clock.now_s += 61
        service.expire_sessions()
        assert list(service.store.folder.rglob("*.f32")) == []


def test_whatever_ends_the_reading_of_a_history_its_run_goes_on(left: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def examine(*args: Any) -> Any:
        raise MemoryError("no room for a map")

    monkeypatch.setattr(kept_runs, "examine", examine)
    with RunningService(left) as service:
        begin(service)
        assert next_event(watch(service), "failed").reason == "the history begins anew: no room for a map"
        assert list(status(service).history_steps) == []
        send(service, 40)
        assert list(status(service).history_steps) == [40]


def test_a_nowcast_whose_window_has_moved_on_is_told_to_be_lost(tmp_path: Path) -> None:
    with RunningService(tmp_path / "1", before_start=lambda servicer: servicer._engines.may_finish.clear()) as service:
        begin(service)
        for step in (10, 20, 30):
            send(service, step)
        folder = as_if_killed(service, tmp_path / "2")
    with RunningService(folder) as service:
        begin(service)
        event = next_event(watch(service), "failed")
        assert (event.base_step, event.reason) == (
            20,
            "the service has ended while it was being made, and states that it needs are gone",
        )
        # The next one was not tried yet.
        assert service.call(_num_tries(service)) == 0


async def _num_tries(service: RunningService) -> int:
    return service.servicer.sessions._sessions["s1"]._num_tries


def test_a_record_that_cannot_be_removed_is_said_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unlink(path: Path, missing_ok: bool = False) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", unlink)
    forget(tmp_path)
    assert f"the record in {tmp_path} cannot be removed" in caplog.text


def test_sessions_go_on_expiring_after_one_that_could_not_be_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    class Sessions:
        def expire(self) -> None:
            calls.append(len(calls))
            if len(calls) == 1:
                raise OSError(30, "Read-only file system")
            raise asyncio.CancelledError

    monkeypatch.setattr(app, "EXPIRY_INTERVAL_S", 0)
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(app._expire_for_ever(SimpleNamespace(sessions=Sessions())))
    assert calls == [0, 1]
