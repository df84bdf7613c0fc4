"""A run that opens does not wait for another's nowcast, with the real service and its Ray actors."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from sidecast.predictors.registry import ENTRY_POINT_GROUP
from sidecast.protos import nowcast_pb2 as pb
from sidecast.protos import nowcast_pb2_grpc
from tests.support.limits import HANG_S
from tests.support.services.harness import chunks, commit_request, join_request, open_request, rank_bytes, state
from tests.support.services.process import ServiceProcess


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ServiceProcess]:
    """A service where someone else's predictor is installed."""
    installed = tmp_path / "installed" / "gated-1.0.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: gated\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text(
        f"[{ENTRY_POINT_GROUP}]\ngated = tests.support.gated_predictor:GatedPredictor\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(installed.parent), os.environ["PYTHONPATH"]]))
    # As on a host that others have filled: Ray would end one actor after another.
    monkeypatch.setenv("RAY_memory_usage_threshold", "0.01")
    running = ServiceProcess(tmp_path, "--history-gib", "0.1")
    running.start()
    try:
        yield running
    finally:
        running.stop()


def test_an_open_is_answered_while_the_nowcast_of_another_run_is_made(service: ServiceProcess, tmp_path: Path) -> None:
    pipes = {name: str(tmp_path / name) for name in ("begun", "go")}
    for pipe in pipes.values():
        os.mkfifo(pipe)
    gated = {"predictor": "gated", "predictor_options_json": json.dumps(pipes), "max_relative_norm": 100.0}
    with grpc.insecure_channel(service.address, [("grpc.enable_http_proxy", 0)]) as channel:
        stub = nowcast_pb2_grpc.NowcasterStub(channel)
        stub.Open(open_request(**gated), timeout=HANG_S)
        for rank in (0, 1):
            stub.Join(join_request(rank))
        events = stub.Watch(pb.WatchRequest(session_id="s1", rank=0), timeout=HANG_S)
        for step in (10, 20):
            for rank in (0, 1):
                messages = chunks(rank_bytes(state(step), rank), rank, step)
                stub.Upload(iter(messages))
                stub.Commit(commit_request(messages))
        assert Path(pipes["begun"]).read_text() == "begun"
        # The engine is in the middle of it now, for as long as we like.
        for index, changes in enumerate(({"predictor": "linear"}, gated)):
            stub.Open(open_request(session_id=f"other-{index}", run_id=f"other-{index}", **changes), timeout=HANG_S)
        Path(pipes["go"]).write_text("go")
        published = next(event.published for event in events if event.WhichOneof("event") == "published")
        assert published.base_step == 20
