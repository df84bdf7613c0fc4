"""What the hook does with messages and modes that the two-rank runs do not bring about; one rank, nothing real."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch

from sidecast.protos.shards import ShardSpec
from sidecast.trainer.nowcast.buffers import SharedBuffer
from sidecast.trainer.nowcast.config import NowcasterConfig
from sidecast.trainer.nowcast.hook import Nowcaster
from sidecast.trainer.nowcast.vote import Ballot, Decision, decide

PREDICTION = {
    "type": "prediction",
    "version": 1,
    "base_step": 20,
    "epoch": 0,
    "horizon_intervals": 5,
    "digest": 7,
    "relative_norm": 0.1,
    "nowcast_s": 0.5,
    "bytes": 8,
}


class FakePartition:
    """Two weights."""

    upload_shards = owned_shards = (ShardSpec(0, 0, 2),)
    parameters = ()

    def __init__(self) -> None:
        self.weights = torch.zeros(2)
        self.rates: tuple[float, ...] = (0.5,)

    def learning_rates(self) -> tuple[float, ...]:
        return self.rates

    def require_current(self) -> None:
        pass

    def read(self, out: torch.Tensor) -> None:
        out.copy_(self.weights)

    def read_owned(self, out: torch.Tensor) -> None:
        out.copy_(self.weights)

    def apply(self, delta: torch.Tensor, weight: float, *, mode: str = "add", base: torch.Tensor | None = None) -> None:
        self.weights = (self.weights if base is None else base) + weight * delta


class FakeCourier:
    """Says what a test wants said, and remembers how long it was waited for."""

    num_deaths = 0
    session_id = "now"

    def __init__(self) -> None:
        self.slots = [SharedBuffer("slot", 8)]
        self.prediction = SharedBuffer("prediction", 8)
        torch.frombuffer(self.prediction.map, dtype=torch.float32).fill_(1.0)
        self.unread: list[Mapping[str, Any]] = []
        self.waited_s: list[float] = []
        self.num_released = 0

    def receive(self, timeout_s: float = 0.0) -> Iterator[Mapping[str, Any]]:
        if timeout_s > 0:
            self.waited_s.append(timeout_s)
        unread, self.unread = self.unread, []
        yield from unread

    def take_slot(self) -> int | None:
        return 0

    def post(self, message: Mapping[str, Any], *, may_be_lost: bool = False) -> bool:
        if message["type"] == "snapshot":
            # So that a wait for the prediction ends.
            self.unread.append({"type": "failed", "step": message["step"], "reason": "none today"})
        return True

    def release_prediction(self, record: Mapping[str, Any] | None) -> None:
        self.num_released += 1


class OneVoter:
    """Everybody agrees with the only rank."""

    def __init__(self) -> None:
        self.ballot: Ballot | None = None

    @property
    def is_open(self) -> bool:
        return self.ballot is not None

    def launch(self, ballot: Ballot) -> None:
        self.ballot = ballot

    def read(self) -> Decision:
        assert self.ballot is not None
        ballot, self.ballot = self.ballot, None
        return decide([ballot])

    def confirm(self, is_ready: bool) -> bool:
        return is_ready


def hook_of(courier: FakeCourier, partition: FakePartition, step: int, **settings: Any) -> Nowcaster:
    config = NowcasterConfig(
        context_len=2, period_steps=20, vote_interval_steps=1, vote_lag_steps=0, rollback="off", **settings
    )
    return Nowcaster(config, partition, courier, OneVoter(), step=step, run_id="run")  # type: ignore[arg-type]


@pytest.mark.parametrize(("session_id", "weight"), [("now", 0.94), ("before the checkpoint was loaded", 0.0)])
def test_a_prediction_of_an_earlier_session_is_given_back_unapplied(session_id: str, weight: float) -> None:
    courier, partition = FakeCourier(), FakePartition()
    hook = hook_of(courier, partition, step=22)
    courier.unread.append({**PREDICTION, "session_id": session_id})
    hook.after_step(23)
    assert partition.weights.tolist() == pytest.approx([weight, weight])
    assert courier.num_released == 1


@pytest.mark.parametrize(("is_suspended", "num_waits"), [(False, 1), (True, 0)])
def test_sync_mode_waits_only_for_what_it_would_apply(is_suspended: bool, num_waits: int) -> None:
    courier = FakeCourier()
    hook = hook_of(courier, FakePartition(), step=19, mode="sync")
    hook._probation.is_suspended = is_suspended
    hook.after_step(20)
    assert len(courier.waited_s) == num_waits


def test_a_nowcast_that_was_never_made_is_failed_and_not_rejected() -> None:
    courier = FakeCourier()
    hook = hook_of(courier, FakePartition(), step=22)
    kinds: list[str] = []
    hook.add_listener(lambda event: kinds.append(event.kind))
    courier.unread.append({"type": "failed", "step": 20, "reason": "none today"})
    hook.after_step(23)
    assert kinds == ["failed"]
    assert (hook.totals.num_failed, hook.totals.num_rejected) == (1, 0)
