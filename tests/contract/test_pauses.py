"""Who may pause a run, who is told, and how long that lasts."""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest

from sidecast.commands.__main__ import main
from sidecast.protos import nowcast_pb2 as pb
from sidecast.protos.transport import AUTHORIZATION_KEY, RUN_SECRET_KEY
from sidecast.protos.version import PROTOCOL_VERSION
from tests.support.services.calls import next_event, refusal
from tests.support.services.dead import OWN, SECRET, as_if_killed, begin, send, watch
from tests.support.services.harness import RunningService, join_request, open_request

PAUSE, GO_ON = (pb.PauseRequest(run_id="run", is_paused=is_paused) for is_paused in (True, False))


@pytest.fixture
def paused(service: RunningService) -> RunningService:
    begin(service, can_pause=True)
    assert service.stub.Pause(PAUSE, metadata=OWN).has_changed
    return service


def shown(service: RunningService) -> pb.SessionStatus:
    (session,) = service.stub.Status(pb.StatusRequest()).sessions
    return session


def test_ranks_are_told_when_they_join_and_while_they_watch(service: RunningService) -> None:
    begin(service, can_pause=True)
    early = watch(service, 0)
    send(service, 10)
    assert next_event(early, "committed").step == 10
    service.stub.Pause(PAUSE, metadata=OWN)
    assert next_event(early, "pause").is_paused
    assert service.stub.Join(join_request(1), metadata=OWN).is_paused
    # Between a rank's joining and its watching nothing is lost either.
    assert not service.stub.Pause(PAUSE, metadata=OWN).has_changed
    service.stub.Pause(GO_ON, metadata=OWN)
    assert next_event(watch(service, 1), "pause").is_paused is False
    assert next_event(early, "pause").is_paused is False
    assert not service.stub.Join(join_request(1), metadata=OWN).is_paused


def test_snapshots_go_on_and_everybody_who_looks_sees_it(paused: RunningService) -> None:
    for step in (10, 20):
        send(paused, step)
    item = shown(paused)
    assert (item.is_paused, item.num_committed) == (True, 2)
    assert paused.metrics.registry.get_sample_value("sidecast_service_paused", {"run_id": "run"}) == 1


def test_a_run_that_was_never_paused_hears_nothing_of_it(service: RunningService) -> None:
    begin(service, can_pause=True)
    events = watch(service)
    send(service, 10)
    assert next(events).WhichOneof("event") == "committed"


def test_it_outlasts_the_service(paused: RunningService, tmp_path: Path) -> None:
    folder = as_if_killed(paused, tmp_path / "next")
    with RunningService(folder) as service:
        begin(service, can_pause=True)
        assert shown(service).is_paused
        assert service.stub.Join(join_request(0), metadata=OWN).is_paused
        assert service.metrics.registry.get_sample_value("sidecast_service_paused", {"run_id": "run"}) == 1
        service.stub.Pause(GO_ON, metadata=OWN)
        folder = as_if_killed(service, tmp_path / "last")
    with RunningService(folder) as service:
        begin(service, can_pause=True)
        assert not shown(service).is_paused


def test_it_outlasts_a_history_that_is_of_no_use(paused: RunningService, tmp_path: Path) -> None:
    send(paused, 10)
    folder = as_if_killed(paused, tmp_path / "next")
    for path in folder.glob("vectors/*/*/*.f32"):
        path.write_bytes(b"cut off")
    with RunningService(folder) as service:
        begin(service, can_pause=True)
        assert list(shown(service).history_steps) == []
        assert shown(service).is_paused


def test_it_outlasts_a_resume_of_the_run(paused: RunningService, tmp_path: Path) -> None:
    begin(paused, "s2", can_pause=True, resumed=True, resume_step=0)
    assert shown(paused).is_paused
    folder = as_if_killed(paused, tmp_path / "next")
    with RunningService(folder) as service:
        # The resume comes to another service than the pause.
        begin(service, "s3", can_pause=True, resumed=True, resume_step=0)
        assert shown(service).is_paused


def test_nobody_else_pauses_a_run(service: RunningService) -> None:
    begin(service, can_pause=True)
    for secret, words in (
        ("", "is protected; allowed: whoever shows its secret"),
        ("x" * 32, "carries another secret"),
    ):
        code, text = refusal(partial(service.stub.Pause, PAUSE, metadata=((RUN_SECRET_KEY, secret),)))
        assert code is grpc.StatusCode.PERMISSION_DENIED
        assert words in text
    assert not shown(service).is_paused
    code, text = refusal(partial(service.stub.Pause, pb.PauseRequest(run_id="another", is_paused=True), metadata=OWN))
    assert (code, text) == (grpc.StatusCode.NOT_FOUND, "run 'another' has no open session here")


def test_a_trainer_that_would_not_heed_it_is_not_asked(service: RunningService) -> None:
    begin(service)
    code, text = refusal(partial(service.stub.Pause, PAUSE, metadata=OWN))
    assert (code, text) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        "run run cannot be paused: its trainer has an older sidecast",
    )


def tenant(name: str, secret: str = "") -> Any:
    return (AUTHORIZATION_KEY, f"Bearer {name}"), *(((RUN_SECRET_KEY, secret),) if secret else ())


@pytest.mark.parametrize("page_control", [True, False])
def test_a_tenants_token_is_enough_where_the_service_says_so(tmp_path: Path, page_control: bool) -> None:
    path = tmp_path / "tenants"
    words = {"red": "", "blue": "", "ops": " operator"}
    path.write_text(
        "".join(f"{name} {hashlib.sha256(name.encode()).hexdigest()}{word}\n" for name, word in words.items())
    )
    with RunningService(tmp_path, tenants_file=path, page_control=page_control) as service:
        opening = open_request(protocol_version=PROTOCOL_VERSION, can_pause=True)
        service.stub.Open(opening, metadata=tenant("red", SECRET))
        for name in ("blue", "ops"):
            for secret in ("", SECRET):
                code, text = refusal(partial(service.stub.Pause, PAUSE, metadata=tenant(name, secret)))
                assert (code, text) == (grpc.StatusCode.PERMISSION_DENIED, "run run is another tenant's")
        if page_control:
            assert service.stub.Pause(PAUSE, metadata=tenant("red")).has_changed
        else:
            assert refusal(partial(service.stub.Pause, PAUSE, metadata=tenant("red")))[0] is (
                grpc.StatusCode.PERMISSION_DENIED
            )
        may_pause = {}
        for name in ("red", "ops"):
            (seen,) = service.stub.Status(pb.StatusRequest(), metadata=tenant(name)).sessions
            may_pause[name] = seen.may_pause
        assert may_pause == {"red": page_control, "ops": False}


def test_the_commands_take_a_file_of_the_run_or_its_name(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with RunningService(tmp_path, page_control=True) as service:
        begin(service, can_pause=True)
        run_file = tmp_path / "run.json"
        run_file.write_text(json.dumps({"run_id": "run", "run_secret": SECRET, "endpoint": service.endpoint}))
        assert main(["pause", str(run_file)]) == 0
        assert capsys.readouterr().out == "run run is paused, from its next vote on\n"
        assert shown(service).is_paused
        assert main(["status", service.endpoint]) == 0
        assert "paused      nothing is applied until `sidecast resume`" in capsys.readouterr().out
        assert main(["resume", "run", "--endpoint", service.endpoint]) == 0
        assert capsys.readouterr().out == "run run is not paused, from its next vote on\n"
        assert main(["resume", "run", "--endpoint", service.endpoint]) == 0
        assert capsys.readouterr().out == "run run is not paused, as it was before\n"
        assert not shown(service).is_paused
        assert main(["pause", "another", "--endpoint", service.endpoint]) == 2
        assert (
            capsys.readouterr().err == f"sidecast: {service.endpoint} refuses: run 'another' has no open session here\n"
        )
