"""Counting ballots."""

from __future__ import annotations

import math

import pytest

from sidecast.trainer.hook.vote import NO_STEP, NO_VERSION, Ballot, decide


@pytest.mark.parametrize(
    "other", [Ballot(), Ballot(2, 7, 1), Ballot(1, 8, 1), Ballot(1, 7, 2)], ids=["none", "version", "digest", "epoch"]
)
def test_one_other_ballot_is_no_agreement(other: Ballot) -> None:
    for ballots in ([Ballot(1, 7, 1), other], [other, Ballot(1, 7, 1), Ballot(1, 7, 1)]):
        decision = decide(ballots)
        assert (decision.version, decision.digest, decision.epoch) == (NO_VERSION, 0, 0)


def test_agreement_and_the_mean_over_all_micro_batches() -> None:
    decision = decide([Ballot(1, 7, 1, 6.0, 3), Ballot(1, 7, 1, 1.0, 1), Ballot(1, 7, 1)])
    assert (decision.version, decision.digest, decision.epoch) == (1, 7, 1)
    assert (decision.mean_loss, decision.num_losses) == (7 / 4, 4)


def test_nobody_saw_a_loss() -> None:
    assert decide([Ballot(), Ballot()]).mean_loss is None


@pytest.mark.parametrize("loss", [0.0, -1.5, 1e300, math.inf])
def test_a_ballot_survives_its_row_of_integers(loss: float) -> None:
    ballot = Ballot(3, 2**63 - 1, 5, loss, 9, 0.1, has_room=False, lost_step=2**40)
    assert Ballot.decode(ballot.encode()) == ballot


def test_nan_is_told() -> None:
    assert math.isnan(Ballot.decode(Ballot(loss_sum=math.nan, num_losses=1).encode()).loss_sum)


def test_the_least_of_what_ranks_leave_of_a_jump_counts() -> None:
    assert decide([Ballot(1, 7, 1), Ballot(1, 7, 1, weight_scale=0.25)]).weight_scale == 0.25


def test_one_rank_without_room_is_enough_and_the_newest_loss_counts() -> None:
    decision = decide([Ballot(), Ballot(has_room=False, lost_step=30), Ballot(lost_step=20)])
    assert (decision.have_room, decision.lost_step) == (False, 30)
    decision = decide([Ballot(), Ballot()])
    assert (decision.have_room, decision.lost_step) == (True, NO_STEP)
