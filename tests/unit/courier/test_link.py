"""What a snapshot waits for while the link to the service is made, and what it does not wait for."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any, TypeVar

import pytest

from sidecast.protos import nowcast_pb2 as pb
from sidecast.trainer.courier import link
from sidecast.trainer.courier.link import Link
from sidecast.trainer.courier.metrics import CourierMetrics
from sidecast.trainer.courier.refusals import RefusedError, ReopenError, UnavailableError
from sidecast.trainer.courier.sender import Sender
from sidecast.trainer.courier.snapshot_outcomes import SnapshotOutcomes
from sidecast.trainer.courier.uploader import Uploader
from sidecast.trainer.pipe.messages import (
    Connected,
    Disconnected,
    Refused,
    Report,
    Sent,
    Session,
    Snapshot,
    ToHook,
)
from tests.support.limits import HANG_S

NUM_BYTES = 64
M = TypeVar("M", bound=ToHook)


def session(session_id: str) -> Session:
    return Session(
        session_id=session_id, run_id="run", resumed=False, resume_step=0, resume_epoch=0, run_secret="secret"
    )


class Events:
    """A watch that a test breaks."""

    def __init__(self) -> None:
        self._is_over = threading.Event()

    def __iter__(self) -> Iterator[pb.SessionEvent]:
        assert self._is_over.wait(HANG_S)
        raise UnavailableError("broken")
        yield

    def cancel(self) -> None:
        self._is_over.set()


class FakeClient:
    """Answers attempts to connect as a test wants, each only once it is allowed to."""

    chunk_bytes = 16
    is_sharing = False
    open_s = 100.0
    call_s = HANG_S

    def __init__(self) -> None:
        self.answers: list[Exception | None] = []
        self.may_answer = threading.Semaphore(0)
        self.is_asked = threading.Event()
        self.is_over = False
        self.watched: list[Events] = []
        self.sent: list[tuple[str, int]] = []
        self.reported: list[str] = []

    def transfer_s(self, num_bytes: int) -> float:
        return HANG_S

    def act_for(self, run_secret: str) -> None:
        assert run_secret == "secret"

    def wait_reachable(self) -> None:
        self.is_asked.set()
        assert self.may_answer.acquire(timeout=HANG_S)
        if self.is_over:
            raise UnavailableError("the test is over")
        if self.answers and (answer := self.answers.pop(0)) is not None:
            raise answer

    def join(self, session_id: str, rank: int, *shards: Any) -> None:
        pass

    def watch(self, session_id: str, rank: int) -> Events:
        self.watched.append(Events())
        return self.watched[-1]

    def upload(self, upload: Any) -> None:
        list(upload.frames())

    def commit(self, upload: Any, snapshot: Any) -> None:
        self.sent.append((upload.key.session_id, upload.key.id))

    def report(self, request: pb.ReportRequest) -> None:
        self.reported.append(request.session_id)


class Condition(threading.Condition):
    """Says when somebody waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.has_waiter = threading.Event()

    def wait(self, timeout: float | None = None) -> bool:
        self.waits.append(threading.current_thread().name)
        if threading.current_thread().name != "link":
            self.has_waiter.set()
        return super().wait(timeout)


class Outgoing:
    """A link and a sender in their threads, and what they tell the hook."""

    def __init__(self) -> None:
        self.client = FakeClient()
        self._told: list[ToHook] = []
        self._has_told = threading.Condition()
        self.link = Link(
            self.client,  # type: ignore[arg-type]
            1,
            ((), ()),
            None,
            session("s1"),
            tell=self._tell,
            on_event=lambda session_id, event: None,
        )
        self.changed = self.link._changed = Condition()
        uploader = Uploader(
            self.client,  # type: ignore[arg-type]
            1,
            [memoryview(bytes(NUM_BYTES))],
            self.link,
            SnapshotOutcomes(),
            CourierMetrics("test", 1, "2"),
            self._tell,
            None,
        )
        self.sender = Sender(self.client, 1, self.link, uploader)  # type: ignore[arg-type]
        self._threads = [
            threading.Thread(target=work, name=name, daemon=True)
            for work, name in ((self.link.run, "link"), (self.sender.run, "outgoing"))
        ]
        for thread in self._threads:
            thread.start()

    def _tell(self, message: ToHook) -> None:
        with self._has_told:
            self._told.append(message)
            self._has_told.notify_all()

    def told_until(self, kind: type[M]) -> tuple[list[ToHook], M]:
        """What the hook is told before the next message of a kind, and that message."""
        before: list[ToHook] = []
        with self._has_told:
            assert self._has_told.wait_for(lambda: any(isinstance(item, kind) for item in self._told), HANG_S), before
            while not isinstance(message := self._told.pop(0), kind):
                before.append(message)
        return before, message

    def told(self, kind: type[M]) -> M:
        """The next message of a kind; the ones before it are forgotten."""
        return self.told_until(kind)[1]

    def answer(self, answer: Exception | None = None) -> None:
        """Lets one attempt to connect end."""
        self.client.answers.append(answer)
        self.client.may_answer.release()

    def stage(self, session_id: str, step: int) -> None:
        self.sender.put(session_id, Snapshot(slot=0, step=step, epoch=0))

    def await_waiter(self) -> None:
        """Returns once the uploader waits for the link."""
        assert self.changed.has_waiter.wait(HANG_S), "the uploader did not wait"

    def close(self) -> None:
        self.client.is_over = True
        self.sender.end()
        self.link.end()
        for events in self.client.watched:
            events.cancel()
        self.client.may_answer.release()
        for thread in self._threads:
            thread.join(HANG_S)
            assert not thread.is_alive()


@pytest.fixture
def outgoing() -> Iterator[Outgoing]:
    running = Outgoing()
    yield running
    running.close()


def connect(outgoing: Outgoing) -> None:
    outgoing.answer()
    assert outgoing.told(Connected).session_id == "s1"
    outgoing.client.is_asked.clear()


def test_a_break_between_two_snapshots_loses_none(outgoing: Outgoing) -> None:
    connect(outgoing)
    outgoing.stage("s1", 10)
    assert outgoing.told(Sent).reason == ""
    outgoing.client.watched[0].cancel()
    assert outgoing.client.is_asked.wait(HANG_S)
    outgoing.stage("s1", 20)
    outgoing.await_waiter()
    outgoing.answer()
    assert outgoing.told(Sent).reason == ""
    assert outgoing.client.sent == [("s1", 10), ("s1", 20)]


@pytest.mark.parametrize(
    ("failures", "told"),
    [
        ([], []),
        (["no service"], ["no service"]),
        (["no service", "no service"], ["no service"]),
    ],
)
def test_a_break_is_told_at_once_and_what_follows_once(
    outgoing: Outgoing, failures: list[str], told: list[str]
) -> None:
    connect(outgoing)
    outgoing.client.watched[0].cancel()
    for reason in failures:
        outgoing.answer(UnavailableError(reason))
    outgoing.answer()
    before, _ = outgoing.told_until(Connected)
    assert before == [Disconnected(reason=reason) for reason in ("broken", *told)]


@pytest.mark.parametrize(
    ("answer", "kind"),
    [(None, Disconnected), (UnavailableError("no service"), Disconnected), (RefusedError("no"), Refused)],
)
def test_who_is_told_of_a_break_does_not_find_the_link_connected(
    outgoing: Outgoing, answer: Exception | None, kind: type[Disconnected | Refused]
) -> None:
    found: list[tuple[ToHook, bool]] = []
    tell = outgoing.link._tell

    def tell_and_look(message: ToHook) -> None:
        found.append((message, outgoing.link.is_connected))
        tell(message)

    outgoing.link._tell = tell_and_look
    connect(outgoing)
    outgoing.client.watched[0].cancel()
    assert outgoing.told(Disconnected).reason == "broken"
    outgoing.answer(answer)
    outgoing.told(Connected if answer is None else kind)
    assert [is_connected for message, is_connected in found if not isinstance(message, Connected)] == [False] * (
        1 if answer is None else 2
    )


def test_every_break_is_told(outgoing: Outgoing) -> None:
    connect(outgoing)
    for events in range(2):
        outgoing.client.watched[events].cancel()
        outgoing.answer()
        before, _ = outgoing.told_until(Connected)
        assert before == [Disconnected(reason="broken")]


def test_the_first_snapshot_of_a_new_session_is_not_lost(outgoing: Outgoing) -> None:
    connect(outgoing)
    outgoing.link.begin(session("s2"))
    outgoing.stage("s1", 10)
    assert outgoing.told(Sent).reason == "not connected"
    outgoing.stage("s2", 20)
    outgoing.await_waiter()
    # Rank 0 may not have opened it yet.
    outgoing.answer(ReopenError("session 's2' is not known here"))
    outgoing.answer()
    sent = outgoing.told(Sent)
    assert sent == Sent(slot=0, step=20, seconds=sent.seconds, num_bytes=NUM_BYTES, reason="")
    assert 0 <= sent.seconds < HANG_S
    assert outgoing.client.sent == [("s2", 20)]


@pytest.mark.parametrize(
    ("answer", "kind"), [(UnavailableError("no service"), Disconnected), (RefusedError("no"), Refused)]
)
def test_while_the_service_is_away_a_slot_is_free_at_once(
    outgoing: Outgoing, answer: Exception, kind: type[Disconnected | Refused]
) -> None:
    outgoing.stage("s1", 10)
    outgoing.await_waiter()
    outgoing.answer(answer)
    assert outgoing.told(kind).reason == str(answer)
    # What waited for the attempt ends with it.
    assert outgoing.told(Sent).reason == "not connected"
    outgoing.changed.waits.clear()
    outgoing.stage("s1", 20)
    assert outgoing.told(Sent).reason == "not connected"
    assert "outgoing" not in outgoing.changed.waits
    assert outgoing.client.sent == []


@pytest.mark.parametrize("refusal", ["another token (UNAUTHENTICATED)", "Method not found! (UNIMPLEMENTED)"])
def test_a_service_that_refuses_a_run_under_way_is_asked_again(
    outgoing: Outgoing, monkeypatch: pytest.MonkeyPatch, refusal: str
) -> None:
    monkeypatch.setattr(link, "FIRST_REFUSED_BACKOFF_S", 0.01)
    connect(outgoing)
    outgoing.client.watched[0].cancel()
    for _ in range(3):
        outgoing.answer(RefusedError(refusal))
    outgoing.answer()
    before, _ = outgoing.told_until(Connected)
    # It is told once.
    assert before == [Disconnected(reason="broken"), Refused(reason=refusal)]


def test_a_session_that_rank_0_never_opens_is_not_waited_for_without_end(outgoing: Outgoing) -> None:
    outgoing.client.open_s = 0.0
    outgoing.stage("s1", 10)
    for _ in range(2):
        outgoing.answer(ReopenError("session 's1' is not known here"))
    assert outgoing.told(Disconnected).reason == "session 's1' is not known here"
    assert outgoing.told(Sent).reason == "not connected"


def test_a_report_waits_for_the_link_as_snapshots_do(outgoing: Outgoing) -> None:
    outgoing.sender.put("s1", Report(outcome="applied", version=1, step=24, epoch=1))
    outgoing.stage("s1", 30)
    outgoing.await_waiter()
    outgoing.answer()
    assert outgoing.told(Sent).reason == ""
    assert outgoing.client.reported == ["s1"]


def test_an_end_wakes_whoever_waits_for_the_link(outgoing: Outgoing) -> None:
    outgoing.stage("s1", 10)
    outgoing.await_waiter()
    outgoing.link.end()
    assert outgoing.told(Sent).reason == "not connected"
