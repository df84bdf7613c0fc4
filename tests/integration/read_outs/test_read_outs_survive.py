"""kill -9 of a service while it averages: the read-outs are those that they would have been, bit for bit."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import grpc
import pytest

from sidecast.protos import nowcast_pb2 as pb
from tests.support.limits import HANG_S
from tests.support.services import steadfast_run
from tests.support.services.mortal import MortalService
from tests.support.services.steadfast_run import INTERVAL_STEPS, NUM_SNAPSHOTS, OWN, SteadfastRun

DEATH_STEP = 60
NAMES = ("ema20", "mean@30")
KIND = "read-outs"


class AveragedRun(SteadfastRun):
    """A run that wants its read-outs alone, and waits for them after each snapshot."""

    def _is_done(self, step: int) -> bool:
        try:
            for rank in (0, 1):
                self._send(step, rank)
            while not self._is_averaged(step):
                pass
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
            self._go_on()
            return False
        return True

    def _is_averaged(self, step: int) -> bool:
        (session,) = self._call(self.stub.Status, pb.StatusRequest()).sessions
        return all(item.step == step for item in session.read_outs if step > 30 or item.name == "ema20")

    def described(self) -> list[tuple[str, int, int, int, int]]:
        """Every read-out: name, step, beginning, number of states and digest."""
        self._connect()
        found = []
        for name in NAMES:
            head, *_ = self.stub.ReadOut(pb.ReadOutRequest(run_id="run", name=name), metadata=OWN, timeout=HANG_S)
            item = head.description.status
            found.append((item.name, item.step, item.begin_step, item.num_snapshots, head.description.digest))
        self.channel.close()
        return found


@pytest.fixture(autouse=True)
def _kind(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = {
        "context_len": 2,
        "period_steps": INTERVAL_STEPS,
        "push": pb.Push(time_constant_steps=30.0, gain=0.0),
        "read_outs": NAMES,
    }
    monkeypatch.setitem(steadfast_run.KINDS, KIND, kind)


@pytest.fixture
def service() -> Iterator[MortalService]:
    running = MortalService()
    try:
        yield running
    finally:
        running.kill()
        shutil.rmtree(running.history.parent)


def averaged(service: MortalService, death: str = "", step: int = 0) -> list[tuple[str, int, int, int, int]]:
    service.start(death, step)
    run = AveragedRun(service, KIND)
    run.train()
    return run.described()


@pytest.mark.parametrize(
    "death",
    [
        "after the record of a commit",
        "in a read-out",
        "before a read-out is known",
        "after a read-out is known",
    ],
)
def test_a_killed_service_changes_no_read_out(service: MortalService, death: str) -> None:
    unharmed = averaged(service)
    service.kill()
    shutil.rmtree(service.history)
    assert averaged(service, death, DEATH_STEP) == unharmed
    assert service.num_deaths == 1
    newest = NUM_SNAPSHOTS * INTERVAL_STEPS
    assert [item[:4] for item in unharmed] == [("ema20", newest, 0, 9), ("mean@30", newest, 30, 6)]
