"""How often a transfer is tried, by a link and a clock that only the waiting moves."""

from __future__ import annotations

import threading

import pytest

from sidecast.trainer.courier.attempts import MAX_CORRUPT, Attempts
from sidecast.trainer.courier.link import FIRST_BACKOFF_S, MAX_BACKOFF_S, Link
from tests.support.courier_harness import session
from tests.support.limits import HANG_S


class FakeLink:
    """Connected until a test says otherwise; its waits take the time that they are given."""

    def __init__(self) -> None:
        self.now_s = 50.0
        self.is_connected = True
        self.is_over = False
        self.waits_s: list[float] = []
        self.rests_s: list[float] = []

    def wait_connected(self, session_id: str, timeout_s: float, *, outlasts_outage: bool) -> bool:
        assert (session_id, outlasts_outage) == ("s1", True)
        self.waits_s.append(timeout_s)
        return self.is_connected

    def rest(self, session_id: str, seconds: float) -> bool:
        assert session_id == "s1"
        self.rests_s.append(seconds)
        self.now_s += seconds
        return not self.is_over


def attempts(link: FakeLink, seconds: float) -> Attempts:
    return Attempts(link, "s1", link.now_s + seconds, clock=lambda: link.now_s)  # type: ignore[arg-type]


def test_the_back_off_doubles_up_to_its_maximum_until_the_deadline() -> None:
    link = FakeLink()
    tried = attempts(link, 5.0)
    while tried.wait():
        pass
    # 0.05 and so on to 0.8, then 1 s as long as there is time left.
    doubled = [FIRST_BACKOFF_S * 2**n for n in range(5)]
    assert link.rests_s == pytest.approx([*doubled, *[MAX_BACKOFF_S] * 4])
    assert link.waits_s[0] == 5.0
    assert link.waits_s[-1] == pytest.approx(5.0 - sum(link.rests_s[:-1]))
    assert link.now_s >= 55.0


def test_damaged_bytes_are_sent_again_a_few_times_only() -> None:
    link = FakeLink()
    tried = attempts(link, 1000.0)
    for _ in range(MAX_CORRUPT - 1):
        tried.note_corrupt()
        assert tried.wait()
    # Interruptions between them do not count.
    assert tried.wait()
    tried.note_corrupt()
    assert not tried.wait()
    assert len(link.rests_s) == MAX_CORRUPT


def test_without_a_connection_nothing_is_tried() -> None:
    link = FakeLink()
    link.is_connected = False
    assert not attempts(link, 5.0).wait()
    assert link.rests_s == []


def test_a_session_that_ends_meanwhile_ends_its_transfer() -> None:
    link = FakeLink()
    link.is_over = True
    assert not attempts(link, 5.0).wait()


@pytest.mark.parametrize("ends", ["link", "session"])
def test_an_end_cuts_a_rest_short(ends: str) -> None:
    client = type("Client", (), {})()
    link = Link(client, 0, ((), ()), None, session("s1"), tell=lambda message: None, on_event=lambda *_: None)
    assert link.rest("s1", 0.0)
    answers: list[bool] = []
    resting = threading.Thread(target=lambda: answers.append(link.rest("s1", 1000.0)), daemon=True)
    resting.start()
    if ends == "link":
        link.end()
    else:
        link.begin(session("s2"))
    resting.join(HANG_S)
    assert answers == [False]
