"""A run that is paused applies nothing on any rank, whichever of them have heard of it; all else goes on."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest

from sidecast.trainer.hook.boundary import NowcastHook
from sidecast.trainer.hook.config import NowcasterConfig, parse_section
from sidecast.trainer.hook.reporting import log_event
from sidecast.trainer.hook.vote import Ballot, Decision, decide
from sidecast.trainer.pipe.messages import Connected, Disconnected, PauseChanged, Snapshot, Stats
from tests.support.hook_harness import PREDICTION, FakeCourier, FakePartition, hook_with, new_hook

PAUSE, GO_ON = PauseChanged(is_paused=True), PauseChanged(is_paused=False)


@pytest.fixture
def courier() -> FakeCourier:
    return FakeCourier()


@pytest.fixture
def partition() -> FakePartition:
    return FakePartition()


def test_one_rank_that_has_heard_is_enough_and_all_must_have_heard_the_end() -> None:
    assert decide([Ballot(), Ballot(is_paused=True)]).is_paused
    assert not decide([Ballot(), Ballot()]).is_paused


def test_a_ballot_tells_of_a_pause_apart_from_its_other_flags() -> None:
    for ballot in (Ballot(is_paused=True), Ballot(is_leaving=True), Ballot(is_ready=False)):
        assert Ballot.decode(ballot.encode()) == ballot


@pytest.mark.parametrize("told", [PAUSE, Connected(session_id="now", is_paused=True)])
def test_nothing_is_voted_for_or_applied_until_the_run_goes_on(
    courier: FakeCourier, partition: FakePartition, told: Any
) -> None:
    hook = new_hook(courier, partition, step=21)
    courier.unread += [told, PREDICTION]
    hook.after_step(22)
    hook.after_step(23)
    assert partition.weights.tolist() == [0, 0]
    assert (hook.totals.num_applied, hook.totals.num_rejected) == (0, 0)
    assert hook.summary()["paused"] is True
    courier.unread.append(GO_ON)
    hook.after_step(24)
    assert hook.totals.num_applied == 1
    assert hook.summary()["paused"] is False


def test_snapshots_go_on_and_metrics_tell(courier: FakeCourier, partition: FakePartition) -> None:
    hook = new_hook(courier, partition, step=8)
    courier.unread.append(PAUSE)
    for step in (9, 10):
        hook.after_step(step)
    assert [message.step for message in courier.posted if isinstance(message, Snapshot)] == [10]
    assert [message.paused for message in courier.posted if isinstance(message, Stats)] == [True]


def test_it_is_said_once_and_its_end_too(
    caplog: pytest.LogCaptureFixture, courier: FakeCourier, partition: FakePartition
) -> None:
    hook = new_hook(courier, partition, step=0)
    hook.add_listener(log_event)
    courier.unread.append(PAUSE)
    with caplog.at_level(logging.WARNING):
        for step in range(1, 6):
            hook.after_step(step)
        # Nor does a service that comes back with what was known before.
        courier.unread += [Disconnected(reason="gone"), Connected(session_id="now", is_paused=True)]
        for step in range(6, 9):
            hook.after_step(step)
        courier.unread.append(GO_ON)
        hook.after_step(9)
    said = [record.message for record in caplog.records if "pauses" not in record.message]
    assert said == ["step 1: jump paused", "step 9: jump resumed"]


def test_a_service_that_is_away_changes_nothing(courier: FakeCourier, partition: FakePartition) -> None:
    hook = new_hook(courier, partition, step=21)
    courier.unread += [PAUSE, PREDICTION, Disconnected(reason="gone")]
    hook.after_step(22)
    hook.after_step(23)
    assert hook.totals.num_applied == 0
    # What came back knows of no pause.
    courier.unread.append(Connected(session_id="now"))
    hook.after_step(24)
    assert hook.totals.num_applied == 1


def test_sync_mode_does_not_wait_for_what_would_not_be_applied(courier: FakeCourier, partition: FakePartition) -> None:
    hook = new_hook(courier, partition, step=18, mode="sync")
    courier.unread.append(PAUSE)
    hook.after_step(19)
    hook.after_step(20)
    assert courier.waited_s == []


def test_pushes_are_not_applied_either(courier: FakeCourier, partition: FakePartition) -> None:
    section = {
        "policy": "push",
        "vote_interval_steps": 1,
        "vote_lag_steps": 0,
        "push": {"interval_steps": 10, "start_step": 0},
    }
    hook = hook_with(parse_section(section), courier, partition, 18)
    for step in (19, 20):
        hook.observe(1.0)
        hook.after_step(step)
    courier.unread += [PAUSE, replace(PREDICTION, horizon_intervals=1)]
    hook.observe(1.0)
    hook.after_step(21)
    assert hook.totals.num_applied == 0
    courier.unread.append(GO_ON)
    hook.observe(1.0)
    hook.after_step(22)
    assert hook.totals.num_applied == 1


class Ring:
    """Where two ranks of one process vote."""

    def __init__(self) -> None:
        self.rounds: list[dict[int, Ballot]] = []


class Voter:
    """One of them.

    Args:
        ring: Both.
        rank: Which.
    """

    left_rank: int | None = None

    def __init__(self, ring: Ring, rank: int) -> None:
        self._ring = ring
        self._rank = rank
        self._num_cast = 0
        self.is_open = False

    def launch(self, ballot: Ballot) -> None:
        if self._num_cast == len(self._ring.rounds):
            self._ring.rounds.append({})
        self._ring.rounds[self._num_cast][self._rank] = ballot
        self._num_cast += 1
        self.is_open = True

    def read(self) -> Decision:
        self.is_open = False
        ballots = self._ring.rounds[self._num_cast - 1]
        return decide([ballots[rank] for rank in (0, 1)])

    def confirm(self, is_ready: bool, values: tuple[int, int] = (0, 0)) -> str:
        return ""


@pytest.mark.parametrize("told", [[0], [1], [0, 1]])
def test_ranks_do_the_same_whichever_of_them_have_heard(told: list[int]) -> None:
    config = NowcasterConfig(context_len=2, period_steps=20, vote_interval_steps=2, vote_lag_steps=1, rollback="off")
    ring, couriers, partitions = Ring(), [FakeCourier(), FakeCourier()], [FakePartition(), FakePartition()]
    hooks = []
    for rank, (courier, partition) in enumerate(zip(couriers, partitions, strict=True)):
        voter: Any = Voter(ring, rank)
        hooks.append(
            NowcastHook(config, partition, courier, voter, step=21, run_id="run")  # type: ignore[arg-type]
        )

    def train(*steps: int) -> list[tuple[int, bool]]:
        for step in steps:
            for hook in hooks:
                hook.after_step(step)
        return [(hook.totals.num_applied, hook.summary()["paused"]) for hook in hooks]

    for rank in (0, 1):
        couriers[rank].unread.append(PREDICTION)
    for rank in told:
        couriers[rank].unread.append(PAUSE)
    assert train(22, 23, 24, 25) == [(0, True), (0, True)]
    # The end of it reaches one of them first.
    couriers[told[0]].unread.append(GO_ON)
    expected = (0, True) if len(told) == 2 else (1, False)
    assert train(26, 27) == [expected, expected]
    for rank in told[1:]:
        couriers[rank].unread.append(GO_ON)
    assert train(28, 29) == [(1, False), (1, False)]
    assert partitions[0].weights.tolist() == partitions[1].weights.tolist() != [0, 0]
