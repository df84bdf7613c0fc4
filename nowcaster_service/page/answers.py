"""What the page's port answers to a request: decided without sockets.

The document is the same for everybody, and holds nothing of anybody's. What it shows is asked for with the caller's
token, in the header that calls of the service have, too; so there are no cookies, no token in an address, and no
request that a browser would make in somebody's name.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus

from sidecast.errors import SidecastError
from sidecast.nowcaster_service.access.callers import Caller, Callers
from sidecast.nowcaster_service.page.document import document

# How old a view may be that several look at: who looks often costs the service nothing more.
VIEW_AGE_S = 1.0
# Callers whose views are kept.
MAX_VIEWS = 64
JSON_TYPE, HTML_TYPE = "application/json; charset=utf-8", "text/html; charset=utf-8"
# What the page shows with a request that changes something.
PAGE_HEADER = "x-sidecast-page"
_READING = ("GET", "HEAD")
# Said with every answer.
_HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
_NOTHING_POLICY = "default-src 'none'; frame-ancestors 'none'"


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request.

    Attributes:
        method: As "GET".
        target: What is asked for, with its query.
        headers: By their names in small letters.
        body: Whole.
    """

    method: str
    target: str
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer; to a HEAD its body is left out when it is sent."""

    status: HTTPStatus
    body: bytes
    headers: Mapping[str, str]


def answer_of(
    status: HTTPStatus, body: bytes, kind: str = JSON_TYPE, *, policy: str = _NOTHING_POLICY, **more: str
) -> Answer:
    """An answer with the headers that all have.

    Args:
        status: Of the answer.
        body: Of the answer.
        kind: Its content type.
        policy: What a browser may do with it.
        more: More headers, with _ for -.
    """
    headers = {"Content-Type": kind, "Content-Length": f"{len(body)}", "Content-Security-Policy": policy, **_HEADERS}
    return Answer(
        status=status, body=body, headers=headers | {name.replace("_", "-"): value for name, value in more.items()}
    )


def refusal(status: HTTPStatus, reason: str, **headers: str) -> Answer:
    """Why there is nothing else, in a sentence."""
    return answer_of(status, json.dumps({"error": reason}).encode(), **headers)


class Answers:
    """Answers requests; lives on one event loop.

    Args:
        callers: Whose requests are answered.
        view: Makes the JSON that a caller may see; may take its time, or raise TimeoutError.
        pause: Pauses (True) or resumes a run for a caller, and raises SidecastError where that may not; None where the
            page is only read.
        needs_token: Whether callers show a token; else it is made sure that a browser was not led here by a name
            that somebody else gave this host.
        host: That the service was told to listen at.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        callers: Callers,
        view: Callable[[Caller], Awaitable[bytes]],
        *,
        pause: Callable[[Caller, str, bool], Awaitable[None]] | None = None,
        needs_token: bool,
        host: str,
        clock: Callable[[], float],
    ) -> None:
        self._callers = callers
        self._view = view
        self._pause = pause
        self._needs_token = needs_token
        self._host = host
        self._clock = clock
        self._views: dict[Caller, tuple[float, asyncio.Future[bytes]]] = {}

    async def answer(self, request: Request) -> Answer:
        """Answers one request."""
        if not self._needs_token and not _is_own_name(request.headers.get("host", ""), self._host):
            return refusal(HTTPStatus.MISDIRECTED_REQUEST, "the page is at this host's address, or localhost")
        path = request.target.partition("?")[0]
        if path not in ("/", "/state", "/pause") or (path == "/pause" and self._pause is None):
            return refusal(HTTPStatus.NOT_FOUND, "there is / and /state")
        methods = ("POST",) if path == "/pause" else _READING
        if request.method not in methods:
            return refusal(HTTPStatus.METHOD_NOT_ALLOWED, "the page is read", Allow=", ".join(methods))
        if path == "/":
            page = document(needs_token=self._needs_token)
            return answer_of(HTTPStatus.OK, page.body, HTML_TYPE, policy=page.policy)
        caller = self._callers.caller(request.headers.get("authorization", ""))
        if caller is None:
            # No scheme that a browser would open a window of its own for.
            return refusal(HTTPStatus.UNAUTHORIZED, "a token is needed", WWW_Authenticate="Bearer")
        try:
            if path == "/pause":
                return await self._paused(request, caller)
            return answer_of(HTTPStatus.OK, await self._seen_by(caller))
        except TimeoutError:
            return refusal(HTTPStatus.SERVICE_UNAVAILABLE, "the service is busy", Retry_After="2")

    async def _paused(self, request: Request, caller: Caller) -> Answer:
        assert self._pause is not None, "there is no such path otherwise"
        if not _is_of_the_page(request):
            return refusal(HTTPStatus.FORBIDDEN, "only the page itself may ask for this")
        try:
            asked = json.loads(request.body)
            run_id, is_paused = asked["run_id"], asked["is_paused"]
            if not (isinstance(run_id, str) and isinstance(is_paused, bool)):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            return refusal(HTTPStatus.BAD_REQUEST, "allowed: a JSON object with run_id, a text, and is_paused")
        try:
            await self._pause(caller, run_id, is_paused)
        except SidecastError as error:
            return refusal(HTTPStatus.CONFLICT, str(error))
        # What is asked for next is to show it.
        self._views.pop(caller, None)
        return answer_of(HTTPStatus.OK, b"{}")

    async def _seen_by(self, caller: Caller) -> bytes:
        now_s = self._clock()
        known = self._views.get(caller)
        if known is None or now_s - known[0] >= VIEW_AGE_S:
            if len(self._views) >= MAX_VIEWS:
                self._views.clear()
            known = self._views[caller] = now_s, asyncio.ensure_future(self._view(caller))
        # Others may wait for it, too.
        return await asyncio.shield(known[1])


def _is_of_the_page(request: Request) -> bool:
    """Whether a request that changes something comes from the page, and no other site has made a browser send it.

    A browser lets other sites send no such header without asking here first, and is not answered then. It also says
    itself where a request comes from.
    """
    headers = request.headers
    origin = headers.get("origin", "")
    return (
        headers.get(PAGE_HEADER) == "1"
        and headers.get("content-type", "").partition(";")[0] == "application/json"
        and headers.get("sec-fetch-site", "same-origin") == "same-origin"
        and (not origin or origin.partition("://")[2] == headers.get("host"))
    )


def _is_own_name(host_header: str, host: str) -> bool:
    """Whether a browser was led here by an address, or by a name that nobody else gives out."""
    name = host_header.rpartition(":")[0] if host_header.rpartition(":")[2].isdecimal() else host_header
    name = name.removeprefix("[").removesuffix("]").lower()
    if name in ("localhost", host.lower()):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
