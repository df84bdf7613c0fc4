"""What the page's port answers, without sockets."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import pytest

from sidecast.nowcaster_service.access.callers import ANYBODY, Caller
from sidecast.nowcaster_service.errors import ForbiddenError
from sidecast.nowcaster_service.page.answers import MAX_VIEWS, VIEW_AGE_S, Answer, Answers, Request
from sidecast.nowcaster_service.page.document import document

HOST = {"host": "localhost:8080"}


class OneToken:
    def caller(self, authorization: str) -> Caller | None:
        scheme, _, name = authorization.partition(" ")
        return Caller(tenant=name) if (scheme, name != "") == ("Bearer", True) else None


class Everybody:
    def caller(self, authorization: str) -> Caller | None:
        return ANYBODY


class Views:
    """Makes views, and counts them."""

    def __init__(self) -> None:
        self.asked: list[Caller] = []
        self.now_s = 0.0
        self.error: Exception | None = None

    async def __call__(self, caller: Caller) -> bytes:
        self.asked.append(caller)
        if self.error is not None:
            raise self.error
        return json.dumps({"of": caller.tenant, "number": len(self.asked)}).encode()

    def clock(self) -> float:
        return self.now_s


@pytest.fixture
def views() -> Views:
    return Views()


def ask(views: Views, *requests: Request, needs_token: bool = False, host: str = "127.0.0.1") -> list[Answer]:
    async def work() -> list[Answer]:
        callers = OneToken() if needs_token else Everybody()
        answers = Answers(callers, views, needs_token=needs_token, host=host, clock=views.clock)
        return [await answers.answer(request) for request in requests]

    return asyncio.run(work())


def state(tenant: str = "") -> Request:
    token = {"authorization": f"Bearer {tenant}"} if tenant else {}
    return Request(method="GET", target="/state", headers=HOST | token)


def test_the_document_runs_what_is_its_own_and_loads_nothing(views: Views) -> None:
    (answer,) = ask(views, Request(method="GET", target="/", headers=HOST))
    text = answer.body.decode()
    policy = answer.headers["Content-Security-Policy"]
    for tag in ("style", "script"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert " style=" not in text
    assert re.findall(r"(?:src|href)=\"(?!data:)", text) == []
    # Names of namespaces apart, no address of anybody's.
    assert set(re.findall(r"https?://([\w.]+)", text)) == {"www.w3.org"}


@pytest.mark.parametrize(("needs_token", "word"), [(True, "needs-token"), (False, "open")])
def test_the_document_knows_whether_it_has_to_ask_for_a_token(needs_token: bool, word: str) -> None:
    assert f'data-access="{word}"'.encode() in document(needs_token=needs_token).body


@pytest.mark.parametrize("target", ["/", "/state", "/nothing"])
def test_every_answer_forbids_frames_sniffing_and_storage(views: Views, target: str) -> None:
    (answer,) = ask(views, Request(method="GET", target=target, headers=HOST))
    assert answer.headers["X-Frame-Options"] == "DENY"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.headers["Referrer-Policy"] == "no-referrer"
    assert "frame-ancestors 'none'" in answer.headers["Content-Security-Policy"]
    assert not [name for name in answer.headers if name.lower().startswith(("access-control", "set-cookie"))]
    assert answer.headers["Content-Length"] == f"{len(answer.body)}"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH", "get"])
@pytest.mark.parametrize("target", ["/", "/state"])
def test_the_page_is_only_read(views: Views, method: str, target: str) -> None:
    (answer,) = ask(views, Request(method=method, target=target, headers=HOST))
    assert (answer.status, answer.headers["Allow"]) == (HTTPStatus.METHOD_NOT_ALLOWED, "GET, HEAD")
    assert views.asked == []


@pytest.mark.parametrize(
    "target", ["/state/", "//state", "/../state", "/favicon.ico", "*", "http://else/state", "state"]
)
def test_there_is_nothing_else(views: Views, target: str) -> None:
    (answer,) = ask(views, Request(method="GET", target=target, headers=HOST))
    assert answer.status is HTTPStatus.NOT_FOUND


def test_a_token_is_shown_in_the_header_and_nowhere_else(views: Views) -> None:
    in_the_address = Request(method="GET", target="/state?token=red", headers=HOST)
    in_a_cookie = Request(method="GET", target="/state", headers=HOST | {"cookie": "token=red"})
    missing, addressed, cookie, right = ask(views, state(), in_the_address, in_a_cookie, state("red"), needs_token=True)
    for answer in (missing, addressed, cookie):
        assert (answer.status, answer.headers["WWW-Authenticate"]) == (HTTPStatus.UNAUTHORIZED, "Bearer")
    assert json.loads(right.body)["of"] == "red"
    assert [caller.tenant for caller in views.asked] == ["red"]


def test_each_caller_has_a_view_of_its_own_which_is_made_once_a_second(views: Views) -> None:
    async def work() -> list[bytes]:
        answers = Answers(OneToken(), views, needs_token=True, host="127.0.0.1", clock=views.clock)
        bodies = []
        for tenant, now_s in (("red", 0.0), ("blue", 0.0), ("red", 0.5), ("red", VIEW_AGE_S)):
            views.now_s = now_s
            bodies.append((await answers.answer(state(tenant))).body)
        return bodies

    red, blue, again, later = [json.loads(body) for body in asyncio.run(work())]
    assert (red["of"], blue["of"]) == ("red", "blue")
    assert again == red
    assert later == {"of": "red", "number": 3}


def test_views_of_many_callers_do_not_pile_up(views: Views) -> None:
    async def work() -> int:
        answers = Answers(OneToken(), views, needs_token=True, host="127.0.0.1", clock=views.clock)
        for number in range(3 * MAX_VIEWS):
            await answers.answer(state(f"tenant{number}"))
        return len(answers._views)

    assert asyncio.run(work()) <= MAX_VIEWS


def test_a_service_that_is_busy_is_said_to_be(views: Views) -> None:
    views.error = TimeoutError()
    (answer,) = ask(views, state())
    assert (answer.status, answer.headers["Retry-After"]) == (HTTPStatus.SERVICE_UNAVAILABLE, "2")


@pytest.mark.parametrize(
    ("name", "host"),
    [
        ("localhost", "127.0.0.1"),
        ("LOCALHOST:8080", "127.0.0.1"),
        ("127.0.0.1:8080", "127.0.0.1"),
        ("[::1]:8080", "::1"),
        ("[::1]", "::1"),
        ("127.0.0.2", "127.0.0.2"),
    ],
)
def test_a_page_without_a_token_is_there_under_names_of_its_own(views: Views, name: str, host: str) -> None:
    (answer,) = ask(views, Request(method="GET", target="/state", headers={"host": name}), host=host)
    assert answer.status is HTTPStatus.OK


@pytest.mark.parametrize("name", ["", "attacker.example", "attacker.example:8080", "127.0.0.1.attacker.example", ":80"])
def test_and_under_no_name_that_others_may_give_it(views: Views, name: str) -> None:
    (answer,) = ask(views, Request(method="GET", target="/state", headers={"host": name}))
    assert answer.status is HTTPStatus.MISDIRECTED_REQUEST
    assert views.asked == []


def test_with_a_token_a_name_is_as_good_as_another(views: Views) -> None:
    request = Request(
        method="GET", target="/state", headers={"host": "nowcaster.example.org", "authorization": "Bearer red"}
    )
    (answer,) = ask(views, request, needs_token=True)
    assert answer.status is HTTPStatus.OK


def test_two_who_ask_at_once_wait_for_one_view(views: Views) -> None:
    may_go: list[Callable[[], None]] = []

    async def slow(caller: Caller) -> bytes:
        gate = asyncio.Event()
        may_go.append(gate.set)
        await gate.wait()
        return await views(caller)

    async def work() -> list[Answer]:
        answers = Answers(Everybody(), slow, needs_token=False, host="127.0.0.1", clock=views.clock)
        asking = [asyncio.create_task(answers.answer(state())) for _ in range(2)]
        while not may_go:
            await asyncio.sleep(0)
        may_go[0]()
        return await asyncio.gather(*asking)

    first, second = asyncio.run(work())
    assert first.body == second.body
    assert len(views.asked) == 1


ASKED = {"host": "localhost:8080", "content-type": "application/json", "x-sidecast-page": "1"}


def control(views: Views, headers: dict[str, str], body: object, **how: Any) -> tuple[Answer, list[tuple[str, bool]]]:
    """Asks for a pause where that is allowed; the answer, and what the service was asked for."""
    asked: list[tuple[str, bool]] = []

    async def pause(caller: Caller, run_id: str, is_paused: bool) -> None:
        asked.append((run_id, is_paused))
        if run_id == "another's":
            raise ForbiddenError("run another's is another tenant's")

    async def work() -> Answer:
        callers = OneToken() if how.get("needs_token") else Everybody()
        made: dict[str, Any] = {"needs_token": False, "pause": pause} | how
        answers = Answers(callers, views, host="127.0.0.1", clock=views.clock, **made)
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await answers.answer(Request(method="POST", target="/pause", headers=headers, body=content))

    return asyncio.run(work()), asked


@pytest.mark.parametrize("more", [{}, {"origin": "http://localhost:8080", "sec-fetch-site": "same-origin"}])
def test_the_page_pauses_a_run(views: Views, more: dict[str, str]) -> None:
    answer, asked = control(views, ASKED | more, {"run_id": "run", "is_paused": True})
    assert (answer.status, asked) == (HTTPStatus.OK, [("run", True)])


@pytest.mark.parametrize(
    "changed",
    [
        {"x-sidecast-page": ""},
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"origin": "https://attacker.example"},
        {"origin": "null"},
        {"origin": "http://localhost:8081"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"sec-fetch-site": "none"},
    ],
)
def test_no_other_site_makes_a_browser_do_it(views: Views, changed: dict[str, str]) -> None:
    answer, asked = control(views, ASKED | changed, {"run_id": "run", "is_paused": True})
    assert (answer.status, asked) == (HTTPStatus.FORBIDDEN, [])


def test_nobody_does_it_without_a_token_where_one_is_needed(views: Views) -> None:
    body = {"run_id": "run", "is_paused": True}
    answer, asked = control(views, ASKED, body, needs_token=True)
    assert (answer.status, asked) == (HTTPStatus.UNAUTHORIZED, [])
    answer, asked = control(views, ASKED | {"authorization": "Bearer red"}, body, needs_token=True)
    assert (answer.status, asked) == (HTTPStatus.OK, [("run", True)])


def test_a_page_that_is_only_read_has_no_such_place(views: Views) -> None:
    answer, _ = control(views, ASKED, {"run_id": "run", "is_paused": True}, pause=None)
    assert answer.status is HTTPStatus.NOT_FOUND


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff",
        [],
        "run",
        {},
        {"run_id": 1, "is_paused": True},
        {"run_id": "run"},
        {"run_id": "run", "is_paused": "yes"},
    ],
)
def test_what_is_no_request_for_a_pause_is_refused(views: Views, body: object) -> None:
    answer, asked = control(views, ASKED, body)
    assert (answer.status, asked) == (HTTPStatus.BAD_REQUEST, [])


def test_what_the_service_refuses_is_said(views: Views) -> None:
    answer, _ = control(views, ASKED, {"run_id": "another's", "is_paused": True})
    assert (answer.status, json.loads(answer.body)) == (
        HTTPStatus.CONFLICT,
        {"error": "run another's is another tenant's"},
    )
