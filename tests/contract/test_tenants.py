"""Tenants share a service and see none but their own runs; tokens change while it runs."""

from __future__ import annotations

import hashlib
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest

from sidecast.commands.__main__ import build_parser
from sidecast.errors import ConfigError
from sidecast.nowcaster_service.access import watched_file
from sidecast.nowcaster_service.access.callers import Caller, callers_of, read_tenants
from sidecast.nowcaster_service.access.scraping import serve_metrics
from sidecast.nowcaster_service.access.watched_file import LOOK_INTERVAL_S, WatchedFile
from sidecast.nowcaster_service.commands import serve
from sidecast.nowcaster_service.config import TOKEN_OPTION, read_token
from sidecast.protos import nowcast_pb2 as pb
from sidecast.protos.transport import AUTHORIZATION_KEY, RUN_SECRET_KEY
from sidecast.protos.version import PROTOCOL_VERSION
from tests.support.services.calls import refusal
from tests.support.services.dead import as_if_killed
from tests.support.services.harness import (
    FakeClock,
    RunningService,
    chunks,
    commit_request,
    join_request,
    open_request,
    rank_bytes,
    service_config,
    state,
)

TOKENS = {"red": "red's own token", "blue": "blue's own token", "ops": "the operator's token"}
RUN_SECRET = "the same secret by chance"


def digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def metadata(tenant: str) -> tuple[tuple[str, str], ...]:
    return ((AUTHORIZATION_KEY, f"Bearer {TOKENS[tenant]}"), (RUN_SECRET_KEY, RUN_SECRET))


@pytest.fixture
def tenants_file(tmp_path: Path) -> Path:
    path = tmp_path / "tenants"
    lines = [f"{name} {digest(token)}" + (" operator" if name == "ops" else "") for name, token in TOKENS.items()]
    path.write_text("\n".join(["# who may call", "", *lines, ""]))
    return path


@pytest.fixture
def shared(tmp_path: Path, tenants_file: Path) -> Iterator[RunningService]:
    """A service with a run of each of two tenants."""
    with RunningService(tmp_path, tenants_file=tenants_file) as service:
        for tenant in ("red", "blue"):
            request = open_request(session_id=tenant, run_id=f"run-{tenant}", protocol_version=PROTOCOL_VERSION)
            service.stub.Open(request, metadata=metadata(tenant))
        yield service


def runs_seen(service: RunningService, tenant: str) -> list[str]:
    reply = service.stub.Status(pb.StatusRequest(), metadata=metadata(tenant))
    return [session.run_id for session in reply.sessions]


def test_each_sees_its_own_runs_and_the_operator_all(shared: RunningService) -> None:
    assert runs_seen(shared, "red") == ["run-red"]
    assert runs_seen(shared, "blue") == ["run-blue"]
    assert runs_seen(shared, "ops") == ["run-red", "run-blue"]


@pytest.mark.parametrize("tenant", ["blue", "ops"])
def test_nobody_acts_for_anothers_run_even_with_its_secret(shared: RunningService, tenant: str) -> None:
    again = open_request(session_id="s9", run_id="run-red", resumed=True, protocol_version=PROTOCOL_VERSION)
    for call, request in (
        (shared.stub.Open, again),
        (shared.stub.Join, join_request(0, session_id="red")),
        (shared.stub.Report, pb.ReportRequest(session_id="red", outcome=pb.ReportRequest.APPLIED, epoch=9)),
    ):
        code, text = refusal(partial(call, request, metadata=metadata(tenant)))
        assert code is grpc.StatusCode.PERMISSION_DENIED
        assert text == "run run-red is another tenant's"
    shared.stub.Join(join_request(0, session_id="red"), metadata=metadata("red"))


def test_a_run_is_its_tenants_after_a_restart_too(tmp_path: Path, tenants_file: Path) -> None:
    opening = open_request(protocol_version=PROTOCOL_VERSION)
    with RunningService(tmp_path / "first", tenants_file=tenants_file) as service:
        service.stub.Open(opening, metadata=metadata("red"))
        for rank in (0, 1):
            service.stub.Join(join_request(rank), metadata=metadata("red"))
            messages = chunks(rank_bytes(state(10), rank), rank, 10)
            service.stub.Upload(iter(messages), metadata=metadata("red"))
            service.stub.Commit(commit_request(messages), metadata=metadata("red"))
        folder = as_if_killed(service, tmp_path / "second")
    with RunningService(folder, tenants_file=tenants_file) as service:
        code, _ = refusal(partial(service.stub.Open, opening, metadata=metadata("blue")))
        assert code is grpc.StatusCode.PERMISSION_DENIED
        service.stub.Open(opening, metadata=metadata("red"))
        (session,) = service.stub.Status(pb.StatusRequest(), metadata=metadata("red")).sessions
        assert list(session.history_steps) == [10]


@pytest.mark.parametrize(
    "authorization", ["", "Bearer ", "Bearer nobody's", TOKENS["red"], f"Bearer {digest(TOKENS['red'])}"]
)
def test_who_has_no_tenants_token_is_refused(shared: RunningService, authorization: str) -> None:
    shown = ((AUTHORIZATION_KEY, authorization),)
    code, _ = refusal(lambda: shared.stub.Status(pb.StatusRequest(), metadata=shown))
    assert code is grpc.StatusCode.UNAUTHENTICATED


def scrape(port: int, tenant: str | None) -> str:
    headers = {} if tenant is None else {"Authorization": f"Bearer {TOKENS[tenant]}"}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/metrics?name[]=sidecast_service_snapshots", headers=headers
    )
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as reply:
        text: str = reply.read().decode()
    return text


def test_metrics_show_what_status_shows(shared: RunningService) -> None:
    port = serve_metrics(
        shared.config,
        shared.metrics.registry,
        callers_of(shared.config),
        shared.servicer.sessions.owners.visible_runs,
        0,
    )
    with pytest.raises(urllib.error.HTTPError, match="401"):
        scrape(port, None)
    for tenant, seen in (("red", {"red"}), ("blue", {"blue"}), ("ops", {"red", "blue"})):
        text = scrape(port, tenant)
        assert {name for name in ("red", "blue") if f'run_id="run-{name}"' in text} == seen
        assert "sidecast_service_sessions 2.0" in text


@pytest.mark.parametrize(
    "line",
    [
        "red",
        "red 12ab",
        f"red {'A' * 64}",
        f"red/blue {'0' * 64}",
        f"red {'0' * 64} admin",
        f"red {'0' * 64} operator now",
    ],
)
def test_a_line_that_is_no_tenant_is_named_and_not_shown(tmp_path: Path, line: str) -> None:
    path = tmp_path / "tenants"
    path.write_text(f"# the next one is wrong\n{line}\n")
    with pytest.raises(ConfigError, match=r"--tenants-file .*tenants, line 2, is no tenant; allowed: a name") as caught:
        read_tenants(path)
    assert line not in str(caught.value)


def test_a_tenant_may_have_two_tokens_and_a_token_one_tenant(tmp_path: Path) -> None:
    path = tmp_path / "tenants"
    path.write_text(f"red {digest('old')}\nred {digest('new')}\n")
    assert read_tenants(path) == {digest("old"): Caller(tenant="red"), digest("new"): Caller(tenant="red")}
    path.write_text(f"red {digest('old')}\nblue {digest('old')}\n")
    with pytest.raises(ConfigError, match="line 2: another line has the same token"):
        read_tenants(path)


def test_a_token_is_replaced_while_the_service_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watched_file, "LOOK_INTERVAL_S", 0.0)

    def code(service: RunningService, token: str) -> Any:
        try:
            service.stub.Status(pb.StatusRequest(), metadata=((AUTHORIZATION_KEY, f"Bearer {token}"),))
        except grpc.RpcError as error:
            return error.code()
        return None

    with RunningService(tmp_path, token="yesterday's") as service:
        assert (code(service, "yesterday's"), code(service, "today's")) == (None, grpc.StatusCode.UNAUTHENTICATED)
        (tmp_path / "service-token").write_text("today's\n")
        assert (code(service, "yesterday's"), code(service, "today's")) == (grpc.StatusCode.UNAUTHENTICATED, None)


def test_a_file_is_looked_at_once_in_a_while_and_nonsense_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock, path = FakeClock(), tmp_path / "token"
    path.write_text("first")
    file = WatchedFile(path, lambda path: read_token(TOKEN_OPTION, path), clock=clock)
    path.write_text("another one")
    assert file.value == "first"
    clock.now_s += LOOK_INTERVAL_S
    assert file.value == "another one"
    for spoil in (path.unlink, lambda: path.write_text("\n")):
        caplog.clear()
        spoil()
        for _ in range(2):
            clock.now_s += LOOK_INTERVAL_S
            assert file.value == "another one"
        assert len(caplog.records) == 1
        assert "what it said before holds" in caplog.text
    path.write_text("the last")
    clock.now_s += LOOK_INTERVAL_S
    assert file.value == "the last"


def test_a_mounted_secret_changes_where_its_link_leads(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "token").write_text(name)
    (tmp_path / "now").symlink_to("first")
    (tmp_path / "token").symlink_to("now/token")
    given = serve.service_config(
        build_parser(["serve"]).parse_args(["serve", "--port", "1", "--token-file", str(tmp_path / "token")]), tmp_path
    ).token_file
    clock = FakeClock()
    file = WatchedFile(given, lambda path: read_token(TOKEN_OPTION, path), clock=clock)
    (tmp_path / "next").symlink_to("second")
    (tmp_path / "next").rename(tmp_path / "now")
    shutil.rmtree(tmp_path / "first")
    clock.now_s += LOOK_INTERVAL_S
    assert file.value == "second"


def test_a_file_that_says_nothing_to_begin_with_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tenants").write_text("# nobody\n")
    with pytest.raises(ConfigError, match="names no tenant"):
        callers_of(service_config(tmp_path, tenants_file=tmp_path / "tenants"))
