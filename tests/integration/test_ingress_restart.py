"""An engine that outlives its ingress does no harm to the runs of the next one, with the real service and Ray."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest
import torch

from sidecast.predictors.base import History
from sidecast.predictors.registry import ENTRY_POINT_GROUP, create_predictor
from sidecast.protos import nowcast_pb2 as pb
from sidecast.protos import nowcast_pb2_grpc
from tests.support.limits import HANG_S
from tests.support.services.harness import (
    MANIFEST,
    chunks,
    commit_request,
    join_request,
    open_request,
    rank_bytes,
    state,
)
from tests.support.services.process import ServiceProcess

INTERVAL_STEPS = 10
CONTEXT_LEN = 5


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ServiceProcess]:
    installed = tmp_path / "installed" / "gated-1.0.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: gated\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text(
        f"[{ENTRY_POINT_GROUP}]\ngated = tests.support.gated_predictor:GatedPredictor\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(installed.parent), os.environ["PYTHONPATH"]]))
    running = ServiceProcess(tmp_path, "--history-gib", "0.1")
    running.start()
    try:
        yield running
    finally:
        running.stop()


class Run:
    """Two ranks of one run, as the service sees them."""

    def __init__(self, stub: nowcast_pb2_grpc.NowcasterStub, name: str, context_len: int, **changes: object) -> None:
        self._stub = stub
        self._name = name
        periods = {"context_len": context_len, "period_steps": context_len * INTERVAL_STEPS}
        request = open_request(session_id=name, run_id=name, max_relative_norm=1e6, **periods, **changes)
        # An ingress that Ray starts again is waited for.
        stub.Open(request, timeout=HANG_S, wait_for_ready=True)
        for rank in (0, 1):
            stub.Join(join_request(rank, name))
        self.events = stub.Watch(pb.WatchRequest(session_id=name, rank=0), timeout=HANG_S)

    def send(self, seeds: list[int]) -> None:
        for index, seed in enumerate(seeds, 1):
            for rank in (0, 1):
                messages = chunks(rank_bytes(state(seed), rank), rank, index * INTERVAL_STEPS, session_id=self._name)
                self._stub.Upload(iter(messages))
                self._stub.Commit(commit_request(messages))

    def await_prediction(self) -> None:
        next(event for event in self.events if event.WhichOneof("event") == "published")


@contextmanager
def connection(service: ServiceProcess) -> Iterator[nowcast_pb2_grpc.NowcasterStub]:
    """One of its own: no call may meet what is left of an earlier one."""
    options = [("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(service.address, options) as channel:
        yield nowcast_pb2_grpc.NowcasterStub(channel)


def ingress_of(service: ServiceProcess) -> psutil.Process:
    (ingress,) = [process for process in service.family() if "IngressActor" in " ".join(process.cmdline())]
    return ingress


def test_nowcasts_of_a_dead_ingress_touch_no_state_and_no_prediction_of_later_runs(
    service: ServiceProcess, tmp_path: Path
) -> None:
    pipes = {name: str(tmp_path / name) for name in ("begun", "go")}
    for pipe in pipes.values():
        os.mkfifo(pipe)
    gated = {"predictor": "gated", "predictor_options_json": json.dumps(pipes), "wire_dtype": pb.BF16}
    with connection(service) as stub:
        in_flight = Run(stub, "in-flight", 2, **gated)
        in_flight.send([1, 2])
        assert Path(pipes["begun"]).read_text() == "begun"
        queued = Run(stub, "queued", 2, predictor="linear")
        queued.send([3, 4])

        ingress = ingress_of(service)
        ingress.kill()
        ingress.wait(HANG_S)
    with connection(service) as stub:
        later = Run(stub, "later", CONTEXT_LEN, predictor="linear")
        seeds = list(range(11, 11 + CONTEXT_LEN))
        later.send(seeds)
        # The engine ends the first nowcast only now, then takes the second one, then this run's.
        Path(pipes["go"]).write_text("go")
        later.await_prediction()

    held = [path.read_bytes() for path in service.history.rglob("*.f32")]
    history = History(MANIFEST, [torch.from_numpy(state(seed)) for seed in seeds])
    predictor = create_predictor("linear")
    expected = torch.empty(MANIFEST.num_elements)
    predictor.predict(history, predictor.max_horizon, expected)
    for vector in (*(state(seed) for seed in seeds), expected.numpy()):
        assert held.count(np.asarray(vector, np.float32).tobytes()) == 1
