"""Read-outs on the wire: kept for a run, told in its status, and handed to whoever shows its secret."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

import grpc
import numpy as np
import pytest

from sidecast.nowcaster_service.access.callers import Caller
from sidecast.nowcaster_service.commands.status import render
from sidecast.nowcaster_service.errors import WrongStateError
from sidecast.nowcaster_service.read_outs.folding import FoldAnswer, FoldRequest, answer_fold
from sidecast.policies.read_outs import read_out_of
from sidecast.protos import nowcast_pb2 as pb
from sidecast.protos.codec import vector_digest
from tests.support.limits import HANG_S
from tests.support.services.calls import WRONG_STATE, refusal, refusal_name, status
from tests.support.services.dead import OWN, as_if_killed, begin, send
from tests.support.services.harness import MANIFEST, FakeEngines, RunningService, open_request, state

NAMES = ("ema5", "mean@15")
NUM_BYTES = 4 * MANIFEST.num_elements


class GatedEngines(FakeEngines):
    """Engines whose folds wait for the test.

    Attributes:
        folds: What was asked for.
        may_fold: Lets one fold pass for each release.
    """

    def __init__(self) -> None:
        super().__init__()
        self.folds: list[FoldRequest] = []
        self.may_fold = threading.Semaphore(0)

    async def fold(self, request: FoldRequest) -> FoldAnswer:
        self.folds.append(request)
        assert await asyncio.to_thread(self.may_fold.acquire, timeout=HANG_S)
        return answer_fold(request)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[RunningService]:
    with RunningService(tmp_path) as running:
        yield running


def settled(service: RunningService) -> dict[str, pb.ReadOutStatus]:
    """The status of all read-outs, once nothing is being averaged."""

    async def is_idle() -> bool:
        return all(session.read_outs.step_in_progress is None for session, _ in service.servicer.sessions.items())

    pause, deadline_s = threading.Event(), time.monotonic() + HANG_S
    while not service.call(is_idle()):
        assert time.monotonic() < deadline_s, "read-outs are averaged for ever"
        pause.wait(0.001)
    return {item.name: item for item in status(service).read_outs}


def parts_of(service: RunningService, name: str, secret: Any = OWN) -> list[pb.ReadOutPart]:
    request = pb.ReadOutRequest(run_id="run", name=name)
    return list(service.stub.ReadOut(request, metadata=secret, timeout=HANG_S))


def values_of(service: RunningService, name: str) -> np.ndarray:
    """A read-out's values, checked as a client does."""
    head, *parts = parts_of(service, name)
    assert all(crc32(part.data) == part.crc32 for part in parts)
    data = b"".join(part.data for part in parts)
    assert head.description.digest == vector_digest(memoryview(data))
    return np.frombuffer(data, np.float32)


def reference(name: str, steps: list[int], begin_step: int) -> np.ndarray:
    """In double precision, from the definition alone: what share of the weight lies on the steps up to each one."""
    read_out = read_out_of(name)

    def mass(step: int) -> float:
        return float((max(0, step - read_out.start_step) / (steps[-1] - read_out.start_step)) ** read_out.power)

    edges = [mass(step) for step in (begin_step, *steps)]
    total = np.zeros(MANIFEST.num_elements)
    for index, step in enumerate(steps):
        total += (edges[index + 1] - edges[index]) / (edges[-1] - edges[0]) * state(step).astype(np.float64)
    return total


def test_states_are_averaged_and_told(service: RunningService) -> None:
    begin(service, read_outs=NAMES)
    assert [item.num_snapshots for item in settled(service).values()] == [0, 0]
    assert refusal(parts_of, service, "ema5") == (WRONG_STATE, "the read-out ema5 has seen no state yet")
    for step in (10, 20, 30):
        send(service, step)
        settled(service)
    found = settled(service)
    assert list(found) == ["ema5", "mean@15"]
    ema, mean = found.values()
    assert (ema.step, ema.begin_step, ema.num_snapshots) == (30, 0, 3)
    assert (mean.step, mean.begin_step, mean.num_snapshots) == (30, 10, 2)
    np.testing.assert_allclose(values_of(service, "ema5"), reference("ema5", [10, 20, 30], 0), atol=1e-6)
    np.testing.assert_allclose(values_of(service, "mean@15"), reference("mean@15", [20, 30], 10), atol=1e-6)
    shown = render(service.stub.Status(pb.StatusRequest()))
    assert "  read-outs   ema5 of step 30 (3 states since step 0), mean@15 of step 30 (2 states since step 10)" in shown
    value = service.metrics.registry.get_sample_value
    assert value("sidecast_service_read_out_step", {"run_id": "run", "read_out": "ema5"}) == 30
    assert value("sidecast_service_read_out_states_total", {"run_id": "run", "result": "averaged"}) == 5


def test_the_description_says_all_that_an_export_needs(service: RunningService) -> None:
    begin(service, read_outs=NAMES)
    send(service, 10)
    settled(service)
    described = parts_of(service, "ema5")[0].description
    assert (described.status.name, described.status.step) == ("ema5", 10)
    assert described.manifest == open_request().manifest


def test_they_are_for_whoever_shows_the_secret_of_the_run(service: RunningService) -> None:
    begin(service, read_outs=NAMES)
    send(service, 10)
    settled(service)
    other = (("sidecast-run-secret", "another secret of the same length"),)
    for secret in ((), other):
        assert refusal_name(parts_of, service, "ema5", secret) == "FORBIDDEN"
    code, message = refusal(parts_of, service, "ema10")
    assert (code, message) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "the read-out is 'ema10'; this run keeps: ema5, mean@15",
    )
    with pytest.raises(grpc.RpcError, match="run 'elsewhere' has no open session here"):
        list(service.stub.ReadOut(pb.ReadOutRequest(run_id="elsewhere", name="ema5"), metadata=OWN))


def test_names_that_are_none_are_refused_at_open(service: RunningService) -> None:
    with pytest.raises(grpc.RpcError, match="a read-out is 'ema99'; allowed: 'emaP'"):
        begin(service, read_outs=("ema99",))


def test_a_run_is_promised_room_for_its_read_outs(tmp_path: Path) -> None:
    # With jumps: two states of the window and five working copies; for read-outs the state that is averaged, one vector
    # each, and two more.
    for index, (names, num_vectors) in enumerate([((), 7), (NAMES, 7 + 1 + 2 + 2)]):
        folder = tmp_path / str(index)
        with RunningService(folder, history_budget_bytes=num_vectors * NUM_BYTES) as service:
            begin(service, read_outs=names)
        with (
            RunningService(folder, history_budget_bytes=num_vectors * NUM_BYTES - 1) as service,
            pytest.raises(grpc.RpcError, match=f"needs {num_vectors * NUM_BYTES} bytes of history"),
        ):
            begin(service, read_outs=names)


def exporting(service: RunningService, name: str) -> Any:
    """A read-out's parts as the service makes them, with nothing in between that could read ahead."""
    parts = service.servicer.read_out(pb.ReadOutRequest(run_id="run", name=name), Caller(secret=OWN[0][1]))

    async def next_part() -> pb.ReadOutPart | None:
        return await anext(parts, None)

    return lambda: service.call(next_part())


def test_an_export_reads_one_average_whatever_comes_meanwhile(service: RunningService) -> None:
    begin(service, read_outs=("ema5",))
    send(service, 10)
    settled(service)
    next_part = exporting(service, "ema5")
    head, first = next_part(), next_part()
    for step in (20, 30, 40):
        send(service, step)
        settled(service)
    data = first.data
    while (part := next_part()) is not None:
        data += part.data
    np.testing.assert_array_equal(np.frombuffer(data, np.float32), state(10))
    assert head.description.status.step == 10
    assert settled(service)["ema5"].step == 40


def test_a_run_has_one_export_at_a_time_and_none_beyond_its_session(service: RunningService) -> None:
    begin(service, read_outs=NAMES)
    send(service, 20)
    settled(service)
    next_part = exporting(service, "ema5")
    assert next_part().description.status.step == 20
    assert refusal_name(parts_of, service, "mean@15") == "SATURATED"
    begin(service, "s2", read_outs=NAMES)
    with pytest.raises(WrongStateError, match="the read-out of step 20 is not published any more"):
        next_part()
    assert service.store.used_bytes == 0


def test_a_state_that_comes_while_one_is_averaged_is_left_out(tmp_path: Path) -> None:
    engines = GatedEngines()
    with RunningService(tmp_path, engines=engines) as service:
        begin(service, read_outs=("ema5",))
        engines.may_fold.release()
        send(service, 10)
        settled(service)
        send(service, 20)
        send(service, 30)
        engines.may_fold.release()
        settled(service)
        engines.may_fold.release()
        send(service, 40)
        settled(service)
        np.testing.assert_allclose(values_of(service, "ema5"), reference("ema5", [10, 20, 40], 0), atol=1e-6)
        value = service.metrics.registry.get_sample_value
        assert value("sidecast_service_read_out_states_total", {"run_id": "run", "result": "left_out"}) == 1


def test_a_state_that_takes_too_long_is_the_last_one(tmp_path: Path) -> None:
    """The next one would take as long, and cost other runs their engine again."""
    engines = GatedEngines()
    with RunningService(tmp_path, engines=engines, nowcast_timeout_s=0.05) as service:
        begin(service, read_outs=NAMES)
        for step in (20, 30):
            send(service, step)
            assert [item.num_snapshots for item in settled(service).values()] == [0, 0]
        assert (len(engines.folds), engines.num_replaced) == (1, 1)
        engines.may_fold.release()


@pytest.mark.parametrize("num_done", [0, 1])
def test_a_service_that_dies_while_it_averages_loses_nothing(tmp_path: Path, num_done: int) -> None:
    """The next one goes on with what was whole, and averages the newest state into what it is not in yet."""
    engines = GatedEngines()
    with RunningService(tmp_path / "a", engines=engines) as service:
        begin(service, read_outs=NAMES)
        # Of step 10, which is before the mean's beginning, and of step 20, into both.
        for step, num_folds in ((10, 1), (20, 2)):
            for _ in range(num_folds):
                engines.may_fold.release()
            send(service, step)
            settled(service)
        send(service, 30)
        for _ in range(num_done):
            engines.may_fold.release()
        while len(engines.folds) < 3 + num_done + 1:
            service.call(asyncio.sleep(0.001))
        left = as_if_killed(service, tmp_path / "b")
        for _ in NAMES:
            engines.may_fold.release()
    with RunningService(left) as service:
        begin(service, read_outs=NAMES)
        found = settled(service)
        assert [(item.step, item.num_snapshots) for item in found.values()] == [(30, 3), (30, 2)]
        np.testing.assert_allclose(values_of(service, "ema5"), reference("ema5", [10, 20, 30], 0), atol=1e-6)
        np.testing.assert_allclose(values_of(service, "mean@15"), reference("mean@15", [20, 30], 10), atol=1e-6)


def test_an_altered_average_is_not_gone_on_with(tmp_path: Path) -> None:
    with RunningService(tmp_path / "a") as service:
        begin(service, read_outs=("ema5",))
        for step in (10, 20):
            send(service, step)
            settled(service)
        left = as_if_killed(service, tmp_path / "b")
        ((session, _),) = service.servicer.sessions.items()
        name = session.read_outs.averages["ema5"].vector.path.name
    (path,) = left.glob(f"vectors/*/*/{name}")
    with path.open("r+b") as file:
        file.write(b"\x01")
    with RunningService(left) as service:
        begin(service, read_outs=("ema5",))
        assert settled(service)["ema5"].num_snapshots == 0


@pytest.mark.parametrize("dies", [False, True])
@pytest.mark.parametrize("resume_step", [30, 25])
def test_a_resume_keeps_what_holds_no_state_beyond_the_checkpoint(tmp_path: Path, dies: bool, resume_step: int) -> None:
    with RunningService(tmp_path / "a") as service:
        begin(service, read_outs=("ema5",))
        for step in (10, 20, 30):
            send(service, step)
            settled(service)
        if not dies:
            _resume(service, resume_step)
        left = as_if_killed(service, tmp_path / "b") if dies else None
    if left is not None:
        with RunningService(left) as service:
            _resume(service, resume_step)


def _resume(service: RunningService, resume_step: int) -> None:
    # Another interval of the votes, and another read-out: neither says anything of the averages.
    begin(service, "s2", resumed=True, resume_step=resume_step, resume_epoch=1, read_outs=NAMES)
    step = 40
    send(service, step, "s2", epoch=1)
    found = settled(service)
    if resume_step == 30:
        expected, begin_step = [10, 20, 30, 40], 0
    else:
        # State 30 is not of this run's way: without the others it is in no average at all.
        expected, begin_step = [40], 30
    assert (found["ema5"].num_snapshots, found["ema5"].begin_step) == (len(expected), begin_step)
    np.testing.assert_allclose(values_of(service, "ema5"), reference("ema5", expected, begin_step), atol=1e-6)


def test_a_resume_with_other_pushes_keeps_them_though_not_the_motion(tmp_path: Path) -> None:
    with RunningService(tmp_path / "a") as service:
        begin(service, read_outs=("ema5",), period_steps=10, push=pb.Push(time_constant_steps=100.0))
        for step in (10, 20):
            send(service, step)
            settled(service)
        left = as_if_killed(service, tmp_path / "b")
    with RunningService(left) as service:
        resumed = {"resumed": True, "resume_step": 20, "resume_epoch": 1}
        begin(service, "s2", read_outs=("ema5",), **resumed)
        send(service, 30, "s2", epoch=1)
        assert settled(service)["ema5"].num_snapshots == 3
        np.testing.assert_allclose(values_of(service, "ema5"), reference("ema5", [10, 20, 30], 0), atol=1e-6)


def test_a_new_epoch_goes_into_the_same_averages(service: RunningService) -> None:
    begin(service, read_outs=("ema5",))
    for step, epoch in ((10, 0), (20, 1), (30, 3)):
        send(service, step, epoch=epoch)
        settled(service)
    np.testing.assert_allclose(values_of(service, "ema5"), reference("ema5", [10, 20, 30], 0), atol=1e-6)


def test_a_state_that_is_not_finite_is_left_out(service: RunningService, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(service, read_outs=("ema5",))
    send(service, 10)
    settled(service)
    with monkeypatch.context() as patch:
        patch.setattr("tests.support.services.dead.state", lambda seed: np.full_like(state(seed), np.nan))
        send(service, 20)
    assert settled(service)["ema5"].step == 10
    send(service, 30)
    settled(service)
    np.testing.assert_allclose(values_of(service, "ema5"), reference("ema5", [10, 30], 0), atol=1e-6)


def test_a_run_may_want_its_read_outs_alone(tmp_path: Path) -> None:
    """With a gain of 0: a state that is received, the one before, and the read-outs' own vectors."""
    push = pb.Push(time_constant_steps=100.0, gain=0.0)
    num_vectors = 2 + 1 + 2
    with RunningService(tmp_path / "a", history_budget_bytes=num_vectors * NUM_BYTES) as service:
        begin(service, read_outs=("ema5",), push=push, period_steps=10)
        for step in (10, 20, 30):
            send(service, step)
            settled(service)
        assert service.store.used_bytes == 2 * NUM_BYTES
        left = as_if_killed(service, tmp_path / "b")
    with RunningService(left) as service:
        begin(service, read_outs=("ema5",), push=push, period_steps=10)
        send(service, 40)
        assert settled(service)["ema5"].num_snapshots == 4
        np.testing.assert_allclose(values_of(service, "ema5"), reference("ema5", [10, 20, 30, 40], 0), atol=1e-6)
        assert status(service).num_failed == 0
