"""The probe on the wire: what a service evaluates of its runs, tells of it, keeps, and makes of what goes wrong."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from sidecast.nowcaster_service.commands.status import render
from sidecast.nowcaster_service.errors import EngineGoneError
from sidecast.nowcaster_service.probing.evaluation import ProbeAnswer, ProbeRequest
from sidecast.nowcaster_service.probing.losses import MAX_POINTS, ProbeLosses
from sidecast.nowcaster_service.read_outs.folding import FoldAnswer, FoldRequest, answer_fold
from sidecast.policies.push import PushConfig
from sidecast.protos import nowcast_pb2 as pb
from tests.contract.test_read_outs import NUM_BYTES, settled, values_of
from tests.support.limits import HANG_S
from tests.support.services.calls import WRONG_STATE, refusal, status
from tests.support.services.dead import OWN, as_if_killed, begin, push_settings, send
from tests.support.services.harness import (
    MANIFEST,
    FakeEngines,
    RunningService,
    chunks,
    commit_request,
    rank_bytes,
    state,
)

# Never loaded: the engines of these tests evaluate without it.
PROBE = "json:loads"


class MeasuringEngines(FakeEngines):
    """The loss of a vector is its first value, or what a test says.

    Attributes:
        answers: Of the next evaluations, before any are made.
        may_evaluate: Lets one evaluation pass for each release, where a test has made it.
        num_evaluated: How many were asked for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.answers: list[ProbeAnswer | Exception] = []
        self.may_evaluate: threading.Semaphore | None = None
        self.num_evaluated = 0

    async def fold(self, request: FoldRequest) -> FoldAnswer:
        # At once: no limit of a test's is one for averages.
        return answer_fold(request)

    async def evaluate(self, request: ProbeRequest) -> ProbeAnswer:
        self.num_evaluated += 1
        if self.may_evaluate is not None:
            assert await asyncio.to_thread(self.may_evaluate.acquire, timeout=HANG_S)
        if not self.answers:
            return ProbeAnswer(loss=float(np.fromfile(request.vector_path, np.float32)[0]))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def probed(service: RunningService) -> pb.ProbeStatus:
    """The probe's status, once nothing is being averaged or evaluated."""

    async def is_idle() -> bool:
        (found,) = [session.read_outs for session, _ in service.servicer.sessions.items()]
        return found.step_in_progress is None and found.probe._task is None

    pause, deadline_s = threading.Event(), time.monotonic() + HANG_S
    while not service.call(is_idle()):
        assert time.monotonic() < deadline_s, "a probe is evaluated for ever"
        pause.wait(0.001)
    return status(service).probe


@pytest.fixture
def engines() -> MeasuringEngines:
    return MeasuringEngines()


@pytest.fixture
def serve(tmp_path: Path, engines: MeasuringEngines) -> Callable[..., RunningService]:
    def make(folder: Path = tmp_path / "a", probe: str | None = PROBE, **changes: Any) -> RunningService:
        return RunningService(folder, engines=engines, probe=probe, **changes)

    return make


def points_of(found: pb.ProbeStatus) -> list[tuple[int, dict[str, float]]]:
    return [(point.step, dict(point.losses)) for point in found.points]


def test_all_of_a_step_is_evaluated_and_told(serve: Any) -> None:
    with serve() as service:
        begin(service, read_outs=("ema5", "mean@15"))
        expected = []
        for step in (10, 20):
            send(service, step)
            probed(service)
            names = ("ema5", "mean@15")[: 1 + (step > 15)]
            losses = {name: float(values_of(service, name)[0]) for name in names}
            expected.append((step, {"raw": float(state(step)[0])} | losses))
        found = probed(service)
        assert points_of(found) == expected
        newest = expected[-1][1]
        assert (found.best, found.fault) == (min(newest, key=newest.__getitem__), "")
        assert [item.probe_loss for item in status(service).read_outs] == [newest["ema5"], newest["mean@15"]]
        np.testing.assert_array_equal(values_of(service, "raw"), state(20))
        shown = render(service.stub.Status(pb.StatusRequest()))
        assert f"raw {newest['raw']:.5f}" in next(line for line in shown.splitlines() if line.startswith("  probe  "))
        value = service.metrics.registry.get_sample_value
        for name, loss in newest.items():
            assert value("sidecast_service_probe_loss", {"run_id": "run", "read_out": name}) == loss
        assert value("sidecast_service_probe_step", {"run_id": "run"}) == 20
        # The copy of the state is no read-out.
        assert value("sidecast_service_read_out_states_total", {"run_id": "run", "result": "averaged"}) == 3


def test_a_run_without_read_outs_and_a_service_without_a_probe_are_as_before(serve: Any, tmp_path: Path) -> None:
    for folder, probe, names in (("b", PROBE, ()), ("c", None, ("ema5",))):
        with serve(tmp_path / folder, probe) as service:
            begin(service, read_outs=names)
            send(service, 10)
            settled(service)
            assert not status(service).HasField("probe")
            message = refusal(values_of, service, "raw")[1]
            assert "the read-out is 'raw'; this run keeps: " in message


def test_the_copy_of_the_state_is_named_among_what_is_kept(serve: Any) -> None:
    with serve() as service:
        begin(service, read_outs=("ema5",))
        assert refusal(values_of, service, "raw") == (WRONG_STATE, "the read-out raw has seen no state yet")
        assert refusal(values_of, service, "ema6")[1] == "the read-out is 'ema6'; this run keeps: ema5, raw"


def test_a_run_is_promised_room_for_its_probe(serve: Any, tmp_path: Path) -> None:
    # For read-outs see test_read_outs.py; one vector more for each, the copy of the state, and the model.
    num_vectors = 7 + 1 + 2 + 2 + 2 + 2
    with serve(history_budget_bytes=num_vectors * NUM_BYTES) as service:
        begin(service, read_outs=("ema5", "mean@15"))
    with (
        serve(tmp_path / "b", history_budget_bytes=num_vectors * NUM_BYTES - 1) as service,
        pytest.raises(grpc.RpcError, match=f"needs {num_vectors * NUM_BYTES} bytes of history"),
    ):
        begin(service, read_outs=("ema5", "mean@15"))


def test_the_room_that_is_promised_is_enough(serve: Any, engines: MeasuringEngines) -> None:
    """States come, and are averaged, while all vectors of an earlier step are still being evaluated."""
    engines.may_evaluate = threading.Semaphore(0)
    # The model takes none of the vectors.
    with serve(history_budget_bytes=(7 + 1 + 2 + 2 + 2 + 2) * NUM_BYTES) as service:
        begin(service, read_outs=("ema5", "mean@5"))
        most = 0
        for step in range(10, 100, 10):
            send(service, step)
            settled(service)
            most = max(most, service.store.used_bytes)
        value = service.metrics.registry.get_sample_value
        assert value("sidecast_service_read_out_states_total", {"run_id": "run", "result": "left_out"}) == 0
        assert engines.num_evaluated == 1
        # Afterwards the newest is next, and no other.
        engines.may_evaluate.release(6)
        assert [step for step, _ in points_of(probed(service))] == [10, 90]
        assert most <= (7 + 1 + 2 + 2 + 2 + 1) * NUM_BYTES


@pytest.mark.parametrize("push", [None, pb.Push(time_constant_steps=30.0, gain=0.0)], ids=["jumps", "pushes"])
def test_neither_snapshots_nor_nowcasts_wait_for_a_probe(
    serve: Any, engines: MeasuringEngines, push: pb.Push | None
) -> None:
    engines.may_evaluate = threading.Semaphore(0)
    kind = {} if push is None else {"push": push, "period_steps": 10}
    with serve() as service:
        begin(service, read_outs=("ema5",), **kind)
        for step in (10, 20, 30, 40):
            send(service, step)
            assert settled(service)["ema5"].step == step
        assert status(service).num_committed == 4
        engines.may_evaluate.release(4)
        # They are of the state that they began with, whatever was written meanwhile.
        first, last = points_of(probed(service))
        assert first == (10, {"raw": float(state(10)[0]), "ema5": float(state(10)[0])})
        assert last == (40, {"raw": float(state(40)[0]), "ema5": float(values_of(service, "ema5")[0])})


def test_no_state_is_copied_while_the_next_one_is_on_its_way(serve: Any, engines: MeasuringEngines) -> None:
    """A push would write over it, and the next one be left out of the averages."""
    engines.may_evaluate = threading.Semaphore(0)
    with serve() as service:
        begin(service, read_outs=("ema5",), push=pb.Push(time_constant_steps=100.0), period_steps=10)
        for step in (10, 20):
            send(service, step)
            assert settled(service)["ema5"].step == step
        parts = [chunks(rank_bytes(state(30), rank), rank, 30) for rank in (0, 1)]
        service.stub.Upload(iter(parts[0]), metadata=OWN)
        engines.may_evaluate.release(4)
        assert [step for step, _ in points_of(probed(service))] == [10]
        service.stub.Upload(iter(parts[1]), metadata=OWN)
        for messages in parts:
            service.stub.Commit(commit_request(messages), metadata=OWN)
        assert [step for step, _ in points_of(probed(service))] == [10, 30]
        assert settled(service)["ema5"].num_snapshots == 3


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (ProbeAnswer(refusal="the model has no head", is_hopeless=True), "the model has no head"),
        (EngineGoneError("killed"), "the engine ended in the middle of it"),
        (ValueError("torn"), "the engine failed; the service's log says how"),
    ],
)
def test_a_probe_that_fails_is_given_up_and_said_once(
    serve: Any,
    engines: MeasuringEngines,
    caplog: pytest.LogCaptureFixture,
    answer: ProbeAnswer | Exception,
    fault: str,
) -> None:
    engines.answers = [answer, answer]
    with serve() as service:
        begin(service, read_outs=("ema5",))
        for step in (10, 20):
            send(service, step)
            found = probed(service)
        assert (found.fault, points_of(found)) == (fault, [])
        assert [record.getMessage() for record in caplog.records if "probe of step" in record.getMessage()][-1:] == [
            f"run run, probe of step 10: {fault}"
        ]
        assert engines.num_evaluated <= 2
        assert settled(service)["ema5"].num_snapshots == 2
        value = service.metrics.registry.get_sample_value
        assert value("sidecast_service_probes_total", {"run_id": "run", "result": "failed"}) == 1
        assert f"  probe       {fault}\n" in render(service.stub.Status(pb.StatusRequest()))


def test_an_engine_that_died_once_is_asked_again(serve: Any, engines: MeasuringEngines) -> None:
    engines.answers = [EngineGoneError("killed")]
    with serve() as service:
        begin(service, read_outs=("ema5",))
        send(service, 10)
        assert [step for step, _ in points_of(probed(service))] == [10]


def test_a_probe_that_takes_too_long_is_the_runs_last_one(serve: Any, engines: MeasuringEngines) -> None:
    engines.may_evaluate = threading.Semaphore(0)
    with serve(nowcast_timeout_s=0.05) as service:
        begin(service, read_outs=("ema5",))
        for step in (10, 20):
            send(service, step)
            found = probed(service)
        assert found.fault == "it took longer than 0.05 s; this run has no more probes"
        assert (engines.num_evaluated, engines.num_probes_replaced, engines.num_replaced) == (1, 1, 0)
        assert settled(service)["ema5"].num_snapshots == 2
        engines.may_evaluate.release()


def test_a_loss_that_is_not_finite_is_left_out_by_name(
    serve: Any, engines: MeasuringEngines, caplog: pytest.LogCaptureFixture
) -> None:
    engines.answers = 2 * [ProbeAnswer(loss=2.0), ProbeAnswer(refusal="the loss is nan")]
    with serve() as service:
        begin(service, read_outs=("ema5",))
        for step in (10, 20):
            send(service, step)
            found = probed(service)
        assert (found.fault, points_of(found)) == ("raw: the loss is nan", [(10, {"ema5": 2.0}), (20, {"ema5": 2.0})])
        assert caplog.text.count("raw: the loss is nan") == 1
        send(service, 30)
        assert probed(service).fault == ""


@pytest.mark.parametrize("other_probe", [False, True])
def test_losses_are_kept_over_a_restart_with_the_same_probe(serve: Any, tmp_path: Path, other_probe: bool) -> None:
    with serve() as service:
        begin(service, read_outs=("ema5",))
        for step in (10, 20):
            send(service, step)
            before = points_of(probed(service))
        left = as_if_killed(service, tmp_path / "b")
    with serve(left, "json:dumps" if other_probe else PROBE) as service:
        begin(service, read_outs=("ema5",))
        # Another probe says of the newest state what it can.
        assert [step for step, _ in points_of(probed(service))] == ([20] if other_probe else [10, 20])
        if not other_probe:
            assert points_of(probed(service)) == before
        send(service, 30)
        assert points_of(probed(service))[-1][0] == 30


@pytest.mark.parametrize("dies", [False, True])
def test_a_resume_keeps_what_was_said_up_to_its_checkpoint(serve: Any, tmp_path: Path, dies: bool) -> None:
    resumed = {"resumed": True, "resume_step": 20, "resume_epoch": 1, "read_outs": ("ema5",)}
    with serve() as service:
        begin(service, read_outs=("ema5",))
        for step in (10, 20, 30):
            send(service, step)
            before = points_of(probed(service))
        if not dies:
            begin(service, "s2", **resumed)
            assert points_of(probed(service)) == before[:2]
        left = as_if_killed(service, tmp_path / "b") if dies else None
    if left is not None:
        with serve(left) as service:
            begin(service, "s2", **resumed)
            assert points_of(probed(service)) == before[:2]


def test_losses_that_are_all_missing_are_not_asked_for_again(serve: Any, engines: MeasuringEngines) -> None:
    engines.answers = 2 * [ProbeAnswer(refusal="the loss is nan")]
    with serve() as service:
        begin(service, read_outs=("ema5",))
        send(service, 10)
        assert points_of(probed(service)) == []
        assert engines.num_evaluated == 2


def test_a_session_that_ends_while_it_is_evaluated_leaves_nothing(serve: Any, engines: MeasuringEngines) -> None:
    engines.may_evaluate = threading.Semaphore(0)
    with serve() as service:
        begin(service, read_outs=("ema5",))
        send(service, 10)
        settled(service)
        service.clock.now_s += 100.0
        service.expire_sessions()
        engines.may_evaluate.release(2)
        pause, deadline_s = threading.Event(), time.monotonic() + HANG_S
        while service.store.used_bytes and time.monotonic() < deadline_s:
            pause.wait(0.001)
        assert service.store.used_bytes == 0


def test_of_a_long_run_points_are_kept_evenly_and_the_newest_always() -> None:
    settings = push_settings(MANIFEST, PushConfig(interval_steps=1))
    losses = ProbeLosses(settings, lambda event: None)
    task: Any = type("Task", (), {"averages": {}, "step": 0})()
    for step in range(1, 5 * MAX_POINTS):
        task.step = step
        losses.finish(task, {"raw": 1.0})
    steps = [point.step for point in losses.points]
    gaps = np.diff(steps)
    assert len(steps) == MAX_POINTS
    assert (steps[0], steps[-1]) == (1, 5 * MAX_POINTS - 1)
    assert gaps.max() <= 2 * np.median(gaps)
