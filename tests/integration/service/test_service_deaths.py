"""What becomes of a service whose parts hang or die, with the real service and Ray: it heals, or ends and says so."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from sidecast.nowcaster_service.commands.serve import RAY_PARENT, RAY_PREFIX, _free_port
from sidecast.predictors.registry import ENTRY_POINT_GROUP
from sidecast.protos import nowcast_pb2 as pb
from sidecast.protos import nowcast_pb2_grpc
from tests.support.limits import HANG_S
from tests.support.services.harness import chunks, commit_request, join_request, open_request, rank_bytes, state
from tests.support.services.process import ServiceProcess

LIMIT_S = 10.0


@pytest.fixture
def gated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Settings of a run whose nowcasts hang."""
    installed = tmp_path / "installed" / "gated-1.0.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: gated\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text(
        f"[{ENTRY_POINT_GROUP}]\ngated = tests.support.gated_predictor:GatedPredictor\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(installed.parent), os.environ["PYTHONPATH"]]))
    pipes = {name: str(tmp_path / name) for name in ("begun", "go")}
    for pipe in pipes.values():
        os.mkfifo(pipe)
    return {"predictor": "gated", "predictor_options_json": json.dumps(pipes), "max_relative_norm": 100.0}


@pytest.fixture
def page_port() -> int:
    """A port that the system gives to nobody."""
    return _free_port("127.0.0.1")


@pytest.fixture
def service(
    request: pytest.FixtureRequest, tmp_path: Path, gated: dict[str, Any], page_port: int
) -> Iterator[ServiceProcess]:
    """With more arguments, if the test has some."""
    arguments = getattr(request, "param", ("--engines-timeout-s", "600"))
    arguments += ("--page-port", f"{page_port}")
    running = ServiceProcess(tmp_path, "--history-gib", "0.1", "--nowcast-timeout-s", f"{LIMIT_S}", *arguments)
    running.start()
    try:
        # Nobody in it is starved by what else a busy host does.
        assert {process.nice() for process in running.family()} == {os.nice(0)}
        yield running
    finally:
        running.stop()


@contextmanager
def connection(service: ServiceProcess) -> Iterator[nowcast_pb2_grpc.NowcasterStub]:
    """One of its own: no call may meet what is left of an earlier one."""
    options = [("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(service.address, options) as channel:
        yield nowcast_pb2_grpc.NowcasterStub(channel)


def begin(stub: nowcast_pb2_grpc.NowcasterStub, name: str, **changes: Any) -> Any:
    """Opens a run and sends what makes one nowcast due; returns its events."""
    request = open_request(session_id=name, run_id=name, **({"max_relative_norm": 100.0} | changes))
    stub.Open(request, timeout=HANG_S, wait_for_ready=True)
    for rank in (0, 1):
        stub.Join(join_request(rank, name))
    events = stub.Watch(pb.WatchRequest(session_id=name, rank=0), timeout=HANG_S)
    for step in (10, 20):
        for rank in (0, 1):
            messages = chunks(rank_bytes(state(step), rank), rank, step, session_id=name)
            stub.Upload(iter(messages))
            stub.Commit(commit_request(messages))
    return events


def outcome(events: Any) -> str:
    """How the nowcast ended."""
    event = next(event for event in events if event.WhichOneof("event") in ("published", "failed"))
    return str(event.failed.reason or "published")


def process_of(service: ServiceProcess, name: str) -> psutil.Process:
    (found,) = [process for process in service.family() if name in " ".join(process.cmdline())]
    return found


def folder_of_ray(service: ServiceProcess) -> Path:
    """Where this service's own Ray keeps its logs and sockets."""
    words = process_of(service, "raylet/raylet").cmdline()
    (name,) = {found[0] for word in words if (found := re.search(rf"{RAY_PARENT}/{RAY_PREFIX}[^/,:=]+", word))}
    return Path(name)


def test_a_nowcast_that_hangs_and_an_engine_that_dies_cost_one_nowcast_each_at_most(
    service: ServiceProcess, gated: dict[str, Any]
) -> None:
    pipes = json.loads(gated["predictor_options_json"])
    with connection(service) as stub:
        hung = begin(stub, "hung", **gated)
        assert Path(pipes["begun"]).read_text() == "begun"
        engine = process_of(service, "EngineActor")
        others = [begin(stub, f"other-{index}", predictor="linear") for index in range(2)]
        assert outcome(hung) == f"the nowcast took longer than {LIMIT_S:g} s"
        # It was ended: a thread that hangs cannot be.
        engine.wait(HANG_S)
        assert [outcome(events) for events in others] == ["published", "published"]

        process_of(service, "EngineActor").kill()
        # Neither an open nor a nowcast meets an engine that is only coming back.
        assert outcome(begin(stub, "later", predictor="linear")) == "published"


def runs_on_the_page(port: int) -> list[str]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/state", timeout=HANG_S) as reply:
        return [run["run_id"] for run in json.load(reply)["sessions"]]


def test_an_ingress_waits_for_its_port(service: ServiceProcess, page_port: int) -> None:
    assert runs_on_the_page(page_port) == []
    log = service.history.parent / "service.log"
    ingress = process_of(service, "IngressActor")
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        ingress.kill()
        ingress.wait(HANG_S)
        other.bind(("127.0.0.1", service.port))
        other.listen()
        with log.open() as lines:
            # Without a pause it would take the processor from what it waits for.
            pause = threading.Event()
            while not any("trying again" in line for line in lines):
                assert service.process.poll() is None
                pause.wait(0.05)
    with connection(service) as stub:
        assert outcome(begin(stub, "later", predictor="linear")) == "published"
    # The page is back, too.
    assert runs_on_the_page(page_port) == ["later"]
    folder = folder_of_ray(service)
    assert folder.exists()
    assert service.stop() == 0
    assert not folder.exists()


@pytest.mark.parametrize("service", [("--engines-timeout-s", "5")], indirect=True)
def test_a_service_without_ray_ends_and_says_why(service: ServiceProcess) -> None:
    folder = folder_of_ray(service)
    process_of(service, "raylet/raylet").kill()
    assert service.process.wait(HANG_S) == 2
    log = (service.history.parent / "service.log").read_text()
    assert "and it has not come back within 5 s" in log
    # Whoever wants to know why finds it.
    assert f"Ray's logs are in {folder} for a day" in log
    assert list(folder.glob("session_*/logs/raylet*"))
    shutil.rmtree(folder)
