"""``sidecast status``: as JSON, again and again, and where there is no answer: one line for people."""

from __future__ import annotations

import json
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest

from sidecast.commands.__main__ import main
from sidecast.nowcaster_service.commands import status
from sidecast.nowcaster_service.config import TlsFiles
from tests.support.services.harness import RunningService, open_request

MAKE_CERTS = Path(__file__).resolve().parents[3] / "deploy" / "make_certs.sh"


@pytest.fixture
def running() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def certificates(find_tool: Callable[[str], str], tmp_path: Path) -> Path:
    """A folder with ``service`` and ``client``."""
    find_tool("openssl")
    subprocess.run(
        [MAKE_CERTS, tmp_path / "service", tmp_path / "client", "localhost"], check=True, capture_output=True
    )
    return tmp_path


def refusal_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["status", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said.removeprefix("sidecast: ").strip()


@pytest.mark.parametrize("endpoint", ["127.0.0.1", ":1", "host:", "host:0", "host:70000", "host:port"])
def test_an_endpoint_that_is_none_is_named(capsys: pytest.CaptureFixture[str], endpoint: str) -> None:
    assert refusal_of(capsys, endpoint) == f"endpoint is {endpoint!r}; allowed: HOST:PORT"


def test_everything_is_there_as_json(capsys: pytest.CaptureFixture[str], running: ExitStack, tmp_path: Path) -> None:
    service = running.enter_context(RunningService(tmp_path))
    service.stub.Open(open_request())
    assert main(["status", service.endpoint, "--json"]) == 0
    reply = json.loads(capsys.readouterr().out)
    assert (reply["service_version"], reply["engines_fault"]) == ("test", "")
    (session,) = reply["sessions"]
    assert (session["run_id"], session["num_joined"], session["read_outs"]) == ("run", 0, [])


def test_watching_outlasts_a_service_and_ends_with_ctrl_c(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pauses: list[float] = []

    def pause(_: threading.Event, seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 1:
            services.close()
        elif len(pauses) == 2:
            raise KeyboardInterrupt

    with ExitStack() as services:
        endpoint = services.enter_context(RunningService(tmp_path)).endpoint
        with monkeypatch.context() as patch:
            patch.setattr(
                status, "threading", SimpleNamespace(Event=lambda: SimpleNamespace(wait=partial(pause, None)))
            )
            assert main(["status", endpoint, "--watch", "7"]) == 0
    said = capsys.readouterr()
    assert said.out.count("sidecast test, up ") == 1
    assert said.err.startswith(f"sidecast: no service can be reached at {endpoint}")
    assert pauses == [7, 7]


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf"])
def test_a_pause_that_is_none_is_refused(capsys: pytest.CaptureFixture[str], seconds: str) -> None:
    assert "--watch is" in refusal_of(capsys, "127.0.0.1:1", "--watch", seconds)


def test_a_port_where_nothing_listens(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        endpoint = f"127.0.0.1:{taken.getsockname()[1]}"
    assert refusal_of(capsys, endpoint).startswith(f"no service can be reached at {endpoint}: nothing listens there")


def test_a_name_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal_of(capsys, "nowhere.invalid:1")
    assert said == "no service can be reached at nowhere.invalid:1: the host's name is not known here"


def test_a_listener_that_never_answers(capsys: pytest.CaptureFixture[str], running: ExitStack) -> None:
    silent = running.enter_context(socket.create_server(("127.0.0.1", 0)))
    endpoint = f"127.0.0.1:{silent.getsockname()[1]}"
    said = refusal_of(capsys, endpoint, "--timeout-s", "0.5")
    assert said.startswith(f"no answer from {endpoint} in time")


def test_another_grpc_service(capsys: pytest.CaptureFixture[str], running: ExitStack) -> None:
    other = grpc.server(ThreadPoolExecutor(1))
    endpoint = f"127.0.0.1:{other.add_insecure_port('127.0.0.1:0')}"
    other.start()
    running.callback(other.stop, None)
    assert refusal_of(capsys, endpoint) == f"what listens at {endpoint} is no nowcaster service, or too old a one"


def test_a_token_that_is_missing(capsys: pytest.CaptureFixture[str], running: ExitStack, tmp_path: Path) -> None:
    service = running.enter_context(RunningService(tmp_path, token="secret"))
    said = refusal_of(capsys, service.endpoint)
    assert said == f"{service.endpoint} refuses to answer: the call carries no token, or a wrong one (--token-file)"


def test_encryption_on_one_side_alone(
    capsys: pytest.CaptureFixture[str], running: ExitStack, certificates: Path, tmp_path: Path
) -> None:
    ca = str(certificates / "client" / "ca.crt")
    plain = running.enter_context(RunningService(tmp_path))
    assert "it does not speak TLS: leave --tls-ca out" in refusal_of(capsys, f"localhost:{plain.port}", "--tls-ca", ca)
    folder = certificates / "service"
    files = TlsFiles(certificate=folder / "tls.crt", private_key=folder / "tls.key")
    (tmp_path / "encrypted").mkdir()
    encrypted = running.enter_context(RunningService(tmp_path / "encrypted", tls=files))
    said = refusal_of(capsys, f"localhost:{encrypted.port}")
    assert "it speaks TLS (--tls-ca), or asks for a certificate" in said


def test_a_certificate_of_another_authority(
    capsys: pytest.CaptureFixture[str], running: ExitStack, certificates: Path, tmp_path: Path
) -> None:
    folder = certificates / "service"
    files = TlsFiles(certificate=folder / "tls.crt", private_key=folder / "tls.key")
    service = running.enter_context(RunningService(tmp_path, tls=files))
    other = tmp_path / "other"
    subprocess.run([MAKE_CERTS, other / "service", other / "client", "localhost"], check=True, capture_output=True)
    said = refusal_of(capsys, f"localhost:{service.port}", "--tls-ca", str(other / "client" / "ca.crt"))
    assert "its certificate is not of the authority in --tls-ca" in said
