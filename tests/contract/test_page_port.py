"""The page's port on a real service: who sees what, within which limits, encrypted where calls are."""

from __future__ import annotations

import hashlib
import json
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from sidecast.commands.__main__ import main
from sidecast.errors import ConfigError
from sidecast.nowcaster_service.access.callers import callers_of
from sidecast.nowcaster_service.access.watched_file import LOOK_INTERVAL_S
from sidecast.nowcaster_service.config import TlsFiles
from sidecast.nowcaster_service.errors import AddressError
from sidecast.nowcaster_service.page import server as page_server
from sidecast.nowcaster_service.page.server import MAX_REQUEST_BYTES
from sidecast.protos import nowcast_pb2 as pb
from sidecast.protos.transport import AUTHORIZATION_KEY
from tests.support.limits import HANG_S
from tests.support.services.harness import RunningService, open_request
from tests.support.services.page import commit_step, open_run, served_page

MAKE_CERTS = Path(__file__).resolve().parents[2] / "deploy" / "make_certs.sh"


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


def exchange(port: int, request: bytes, context: ssl.SSLContext | None = None) -> tuple[int, bytes]:
    """Sends some bytes, and returns the status and the body of what comes back until the connection ends."""
    with socket.create_connection(("127.0.0.1", port), HANG_S) as plain, ExitStack() as wrapped:
        connection = plain
        if context is not None:
            connection = wrapped.enter_context(context.wrap_socket(plain, server_hostname="localhost"))
        connection.sendall(request)
        received = b""
        while data := connection.recv(1 << 16):
            received += data
    head, _, body = received.partition(b"\r\n\r\n")
    return int(head.split()[1]) if head else 0, body


def get(target: str, **headers: str) -> bytes:
    lines = [f"GET {target} HTTP/1.1", "Host: localhost", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode()


def state_of(port: int, token: str = "") -> dict[str, Any]:
    status, body = exchange(port, get("/state", **({"Authorization": f"Bearer {token}"} if token else {})))
    assert status == 200, body
    state: dict[str, Any] = json.loads(body)
    return state


def test_the_page_and_the_command_have_one_view(
    capsys: pytest.CaptureFixture[str], stack: ExitStack, tmp_path: Path
) -> None:
    service = stack.enter_context(RunningService(tmp_path))
    page = stack.enter_context(served_page(service))
    open_run(service, "run", read_outs=["ema5"])
    for step in (10, 20):
        commit_step(service, step, "run")
    service.stub.Report(pb.ReportRequest(session_id="run", version=1, outcome=pb.ReportRequest.APPLIED, epoch=1))
    assert main(["status", service.endpoint, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    shown = state_of(page.port)
    assert shown == told
    (run,) = shown["sessions"]
    (nowcast,) = run["recent_nowcasts"]
    assert (run["num_joined"], run["snapshot_step"], run["snapshot_age_seconds"]) == (2, "20", 0.0)
    assert (nowcast["base_step"], nowcast["outcome"]) == ("20", "applied")
    assert (run["policy"], run["num_applied"], run["read_outs"][0]["name"]) == ("jump", "1", "ema5")
    assert shown["engines"]["num_engines"] == 1


def test_a_tenant_sees_its_own_runs_and_whose_they_are(stack: ExitStack, tmp_path: Path) -> None:
    path = tmp_path / "tenants"
    names = {"red": "", "blue": "", "ops": " operator"}
    path.write_text(
        "".join(f"{name} {hashlib.sha256(name.encode()).hexdigest()}{word}\n" for name, word in names.items())
    )
    service = stack.enter_context(RunningService(tmp_path, tenants_file=path))
    page = stack.enter_context(served_page(service))
    for name in ("red", "blue"):
        service.stub.Open(
            open_request(session_id=name, run_id=f"run-{name}"),
            metadata=((AUTHORIZATION_KEY, f"Bearer {name}"),),
        )
    assert [run["run_id"] for run in state_of(page.port, "red")["sessions"]] == ["run-red"]
    seen = {run["run_id"]: run["tenant"] for run in state_of(page.port, "ops")["sessions"]}
    assert seen == {"run-red": "red", "run-blue": "blue"}
    for token in ("", "nobody"):
        status, body = exchange(page.port, get("/state", Authorization=f"Bearer {token}"))
        assert (status, b"run-" in body) == (401, False)
    # The document itself holds nothing of anybody's.
    status, body = exchange(page.port, get("/"))
    assert (status, b"run-" in body, b"needs-token" in body) == (200, False, True)


def test_whose_turn_it_is_only_those_learn_who_may_know_of_the_run(stack: ExitStack, tmp_path: Path) -> None:
    path = tmp_path / "tenants"
    path.write_text("".join(f"{name} {hashlib.sha256(name.encode()).hexdigest()}\n" for name in ("red", "blue")))
    service = stack.enter_context(RunningService(tmp_path, tenants_file=path))
    turns = service.servicer._dispatcher.queues["nowcasts"]
    red = ((AUTHORIZATION_KEY, "Bearer red"),)
    service.stub.Open(open_request(run_id="run-red"), metadata=red)

    async def look() -> list[str]:
        async with turns.turn("run-red"):
            replies = [await service.servicer.overview.reply(callers.caller(f"Bearer {name}")) for name in names]
        return [reply.queues[0].run_id for reply in replies]

    callers, names = callers_of(service.config), ("red", "blue")
    assert service.call(look()) == ["run-red", ""]


def test_a_head_has_no_body_and_a_request_one_connection(stack: ExitStack, tmp_path: Path) -> None:
    page = stack.enter_context(served_page(stack.enter_context(RunningService(tmp_path))))
    twice = get("/state").replace(b"GET", b"HEAD") + get("/state")
    assert exchange(page.port, twice) == (200, b"")


@pytest.mark.parametrize(
    ("request_bytes", "expected"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + MAX_REQUEST_BYTES * b"x", 431),
        (b"GET /" + 2 * MAX_REQUEST_BYTES * b"x", 431),
        (b"\x16\x03\x01\x02\x00\x01", 400),
        (b"", 0),
    ],
)
def test_what_is_no_request_is_refused_and_no_more(
    stack: ExitStack, tmp_path: Path, request_bytes: bytes, expected: int
) -> None:
    page = stack.enter_context(served_page(stack.enter_context(RunningService(tmp_path))))
    with socket.create_connection(("127.0.0.1", page.port), HANG_S) as connection:
        try:
            connection.sendall(request_bytes)
            connection.shutdown(socket.SHUT_WR)
            received = connection.recv(1 << 16)
        except ConnectionError:
            # It was answered before all of it was sent.
            received = b"HTTP/1.1 431"
    assert (int(received.split()[1]) if received else 0) == expected
    assert state_of(page.port)["sessions"] == []


def test_who_sends_nothing_and_who_sends_slowly_is_cut_off(
    monkeypatch: pytest.MonkeyPatch, stack: ExitStack, tmp_path: Path
) -> None:
    monkeypatch.setattr(page_server, "CONNECTION_S", 0.2)
    monkeypatch.setattr(page_server, "MAX_CONNECTIONS", 2)
    page = stack.enter_context(served_page(stack.enter_context(RunningService(tmp_path))))
    silent = [stack.enter_context(socket.create_connection(("127.0.0.1", page.port), HANG_S)) for _ in range(4)]
    silent[0].sendall(b"GET / HTTP/1.1\r\n")
    # In the queue behind all of them, two at a time.
    assert state_of(page.port)["sessions"] == []
    for connection in silent:
        assert connection.recv(1) == b""


def test_a_busy_service_does_not_hold_the_page_up(
    monkeypatch: pytest.MonkeyPatch, stack: ExitStack, tmp_path: Path
) -> None:
    monkeypatch.setattr(page_server, "VIEW_S", 0.1)
    service = stack.enter_context(RunningService(tmp_path))
    page = stack.enter_context(served_page(service))
    may_go = threading.Event()
    service._loop.call_soon_threadsafe(may_go.wait)
    try:
        assert exchange(page.port, get("/state"))[0] == 503
        assert exchange(page.port, get("/"))[0] == 200
    finally:
        may_go.set()


def test_a_port_that_is_taken_is_named(stack: ExitStack, tmp_path: Path) -> None:
    service = stack.enter_context(RunningService(tmp_path))
    page = stack.enter_context(served_page(service))
    with pytest.raises(AddressError, match=rf"cannot serve the page at 127\.0\.0\.1:{page.port}: .* \(--page-port\)"):
        stack.enter_context(served_page(service, page.port))


@pytest.fixture
def certificates(find_tool: Callable[[str], str], tmp_path: Path) -> Callable[[str], tuple[TlsFiles, ssl.SSLContext]]:
    """Makes an authority: a service's files, and what a browser trusts."""
    find_tool("openssl")

    def make(name: str) -> tuple[TlsFiles, ssl.SSLContext]:
        folder = tmp_path / name
        subprocess.run([MAKE_CERTS, folder / "s", folder / "c", "localhost"], check=True, capture_output=True)
        files = TlsFiles(certificate=folder / "s" / "tls.crt", private_key=folder / "s" / "tls.key")
        return files, ssl.create_default_context(cafile=str(folder / "c" / "ca.crt"))

    return make


def test_the_page_is_encrypted_where_calls_are_and_its_certificate_may_change(
    certificates: Callable[[str], tuple[TlsFiles, ssl.SSLContext]],
    monkeypatch: pytest.MonkeyPatch,
    stack: ExitStack,
    tmp_path: Path,
) -> None:
    files, trusted = certificates("first")
    later, trusted_later = certificates("later")
    service = stack.enter_context(RunningService(tmp_path, token="secret", tls=files))
    page = stack.enter_context(served_page(service))
    request = get("/state", Authorization="Bearer secret")
    assert exchange(page.port, request, trusted)[0] == 200
    assert exchange(page.port, request)[0] == 0
    later.certificate.replace(files.certificate)
    later.private_key.replace(files.private_key)
    page._encryption._looked_s = time.monotonic() - LOOK_INTERVAL_S  # type: ignore[union-attr]
    assert exchange(page.port, request, trusted_later)[0] == 200


def test_a_certificate_that_is_none_is_named(tmp_path: Path, stack: ExitStack) -> None:
    for name in ("tls.crt", "tls.key"):
        (tmp_path / name).write_text("nothing")
    service = stack.enter_context(RunningService(tmp_path))
    object.__setattr__(
        service.config, "tls", TlsFiles(certificate=tmp_path / "tls.crt", private_key=tmp_path / "tls.key")
    )
    with pytest.raises(ConfigError, match=r"tls\.crt, .*tls\.key cannot be used for TLS: "):
        stack.enter_context(served_page(service))
