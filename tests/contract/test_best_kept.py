"""The read-outs with the lowest losses on the probe are kept, of whatever step, and over whatever comes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from sidecast.nowcaster_service.commands.status import render
from sidecast.nowcaster_service.probing.evaluation import ProbeAnswer
from sidecast.policies.read_outs import read_out_of
from sidecast.protos import nowcast_pb2 as pb
from tests.contract.test_probe import PROBE, MeasuringEngines, engines, probed, serve
from tests.contract.test_read_outs import NUM_BYTES, parts_of, values_of
from tests.support.services.calls import WRONG_STATE, refusal
from tests.support.services.dead import as_if_killed, begin, send
from tests.support.services.harness import RunningService, state

__all__ = ["engines", "serve"]

# Of ema5 and of the state, step by step: the best is ema5 of step 20, the second the state of step 10.
LOSSES = {10: (5.0, 2.0), 20: (1.0, 6.0), 30: (3.0, 4.0)}
KEPT = [("ema5", 20, 1.0), ("raw", 10, 2.0)]


def train(service: RunningService, engines: MeasuringEngines, steps: Any = LOSSES, session_id: str = "s1") -> None:
    for step in steps:
        engines.answers = [ProbeAnswer(loss=loss) for loss in LOSSES[step]]
        send(service, step, session_id)
        probed(service)


def kept(service: RunningService) -> list[tuple[str, int, float]]:
    return [(item.name, item.step, item.probe_loss) for item in probed(service).kept]


def ema_of_two() -> np.ndarray:
    """The read-out of step 20, as it was then."""
    share = read_out_of("ema5").share(0, 10, 20)
    return (1 - share) * state(10) + share * state(20)


def check_values(service: RunningService) -> None:
    np.testing.assert_allclose(values_of(service, "best1"), ema_of_two(), atol=1e-6)
    np.testing.assert_array_equal(values_of(service, "best2"), state(10))


def test_the_best_are_kept_though_newer_ones_come(serve: Any, engines: MeasuringEngines) -> None:
    with serve() as service:
        begin(service, read_outs=("ema5",), keep_best=2)
        assert refusal(values_of, service, "best1") == (WRONG_STATE, "the read-out best1 has seen no state yet")
        train(service, engines)
        assert kept(service) == KEPT
        check_values(service)
        described = parts_of(service, "best1")[0].description.status
        assert (described.name, described.step, described.num_snapshots, described.probe_loss) == ("ema5", 20, 2, 1.0)
        shown = render(service.stub.Status(pb.StatusRequest()))
        assert "  best kept   ema5 of step 20 (1.00000), raw of step 10 (2.00000)\n" in shown
        # Two states of the window, a prediction, the read-out, the copy of the state, and these two: no more is left.
        assert service.store.used_bytes == (3 + 1 + 1 + 2) * NUM_BYTES
        service.clock.now_s += 100.0
        service.expire_sessions()
        assert service.store.used_bytes == 0


def test_what_is_kept_may_be_what_there_is(serve: Any, engines: MeasuringEngines, tmp_path: Path) -> None:
    """One file, which is the read-out's of now and the best: given back when it is neither."""
    with serve() as service:
        begin(service, read_outs=("ema5",), keep_best=1)
        train(service, engines, (10, 20))
        assert kept(service) == KEPT[:1]
        left = as_if_killed(service, tmp_path / "b")
    with serve(left) as service:
        begin(service, read_outs=("ema5",), keep_best=1)
        assert kept(service) == KEPT[:1]
        np.testing.assert_array_equal(values_of(service, "best1"), values_of(service, "ema5"))
        train(service, engines, (30,))
        np.testing.assert_allclose(values_of(service, "best1"), ema_of_two(), atol=1e-6)
        engines.answers = [ProbeAnswer(loss=0.5), ProbeAnswer(loss=0.75)]
        send(service, 40)
        assert kept(service) == [("ema5", 40, 0.5)]
        assert service.store.used_bytes == (3 + 1 + 1) * NUM_BYTES


@pytest.mark.parametrize("other_probe", [False, True])
def test_the_best_are_kept_over_a_restart_with_the_same_probe(
    serve: Any, engines: MeasuringEngines, tmp_path: Path, other_probe: bool
) -> None:
    with serve() as service:
        begin(service, read_outs=("ema5",), keep_best=2)
        train(service, engines)
        left = as_if_killed(service, tmp_path / "b")
    engines.answers = [ProbeAnswer(loss=9.0), ProbeAnswer(loss=8.0)]
    with serve(left, "json:dumps" if other_probe else PROBE) as service:
        begin(service, read_outs=("ema5",), keep_best=2)
        if other_probe:
            assert kept(service) == [("raw", 30, 8.0), ("ema5", 30, 9.0)]
        else:
            assert kept(service) == KEPT
            check_values(service)
            # And over the next one.
            left = as_if_killed(service, tmp_path / "c")
            with serve(left) as third:
                begin(third, read_outs=("ema5",), keep_best=2)
                check_values(third)
        service.clock.now_s += 100.0
        service.expire_sessions()
        assert service.store.used_bytes == 0


def test_an_altered_file_is_not_gone_on_with(serve: Any, engines: MeasuringEngines, tmp_path: Path) -> None:
    with serve() as service:
        begin(service, read_outs=("ema5",), keep_best=2)
        train(service, engines)
        left = as_if_killed(service, tmp_path / "b")
        ((session, _),) = service.servicer.sessions.items()
        name = session.read_outs.probe.best.items[1].average.vector.path.name
    (path,) = left.glob(f"vectors/*/*/{name}")
    with path.open("r+b") as file:
        file.write(b"\x01")
    with serve(left) as service:
        begin(service, read_outs=("ema5",), keep_best=2)
        assert kept(service) == []


@pytest.mark.parametrize("dies", [False, True])
@pytest.mark.parametrize(
    ("resume_step", "keep_best", "expected"), [(20, 2, KEPT), (10, 2, KEPT[1:]), (30, 1, KEPT[:1])]
)
def test_a_resume_keeps_the_best_of_before_its_checkpoint(
    serve: Any,
    engines: MeasuringEngines,
    tmp_path: Path,
    dies: bool,
    resume_step: int,
    keep_best: int,
    expected: list[tuple[str, int, float]],
) -> None:
    resumed = {"resumed": True, "resume_step": resume_step, "resume_epoch": 0, "read_outs": ("ema5",)}
    with serve() as service:
        begin(service, read_outs=("ema5",), keep_best=2)
        train(service, engines)
        if not dies:
            begin(service, "s2", keep_best=keep_best, **resumed)
            assert kept(service)[: len(expected)] == expected
        left = as_if_killed(service, tmp_path / "b") if dies else None
    if left is not None:
        with serve(left) as service:
            begin(service, "s2", keep_best=keep_best, **resumed)
            assert kept(service)[: len(expected)] == expected
            service.clock.now_s += 100.0
            service.expire_sessions()
            assert service.store.used_bytes == 0


def test_what_is_kept_and_given_back_at_once_is_given_back_once(
    serve: Any, engines: MeasuringEngines, tmp_path: Path
) -> None:
    """The read-out of now is the best, and is beyond the checkpoint of a resume that goes on with nothing else."""
    with serve() as service:
        begin(service, read_outs=("ema5",), keep_best=2)
        train(service, engines, (10, 20))
        left = as_if_killed(service, tmp_path / "b")
    resumed = {"resumed": True, "resume_step": 10, "read_outs": ("ema5",), "keep_best": 2}
    with serve(left) as service:
        begin(service, "s2", **resumed, push=pb.Push(time_constant_steps=100.0), period_steps=10)
        assert kept(service) == [("raw", 10, 2.0)]
        assert service.store.used_bytes == NUM_BYTES
        paths = [spare.path for spare in service.store._spares]
        assert len(set(paths)) == len(paths)


def test_a_run_is_promised_room_for_the_best(serve: Any, tmp_path: Path) -> None:
    # For the rest see test_probe.py.
    num_vectors = (7 + 1 + 1 + 2 + 1 + 2) + 3
    with serve(history_budget_bytes=num_vectors * NUM_BYTES) as service:
        begin(service, read_outs=("ema5",), keep_best=3)
    with (
        serve(tmp_path / "b", history_budget_bytes=num_vectors * NUM_BYTES - 1) as service,
        pytest.raises(grpc.RpcError, match=f"needs {num_vectors * NUM_BYTES} bytes of history"),
    ):
        begin(service, read_outs=("ema5",), keep_best=3)


def test_what_cannot_be_kept_is_refused_at_open(serve: Any, tmp_path: Path) -> None:
    np.save(tmp_path / "probe.npy", np.arange(4))
    for folder, probe, fields, reason in (
        ("a", PROBE, {"keep_best": 9, "read_outs": ("ema5",)}, "keep_best is 9; allowed: 0 to 8, and 0 without"),
        ("b", PROBE, {"keep_best": 1}, "keep_best is 1; allowed: 0 to 8, and 0 without read_outs"),
        ("c", None, {"keep_best": 1, "read_outs": ("ema5",)}, "allowed: 0, since the service has no probe"),
        (
            "d",
            str(tmp_path / "probe.npy"),
            {"keep_best": 1, "read_outs": ("ema5",)},
            "allowed: 0, since the probe is one of tokens, and the model's configuration has no",
        ),
    ):
        with serve(tmp_path / folder, probe) as service, pytest.raises(grpc.RpcError, match=reason):
            begin(service, **fields)
