"""Snapshots that are lost: every rank leaves out the same ones, and says so once it happens too often."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest

from sidecast.trainer.hook.slots import Slot, SlotState
from sidecast.trainer.hook.vote import Ballot, decide
from sidecast.trainer.hook.windows import MIN_WINDOWS, WindowLosses
from sidecast.trainer.pipe.messages import Sent, Snapshot
from tests.support.hook_harness import FakeCourier, FakePartition, new_hook

PERIOD_STEPS = 20
IN_TIME = Sent(slot=0, step=0, seconds=0.25, num_bytes=8, reason="")


def agreed(*ranks: WindowLosses, have_room: bool = True) -> None:
    decision = decide([Ballot(lost_step=rank.newest_step, has_room=have_room) for rank in ranks])
    for rank in ranks:
        rank.agree(decision)


def test_what_one_rank_loses_all_ranks_leave_out_until_the_next_window() -> None:
    ranks = [WindowLosses(PERIOD_STEPS) for _ in range(3)]
    ranks[1].lose(25)
    # Nobody acts on what only one rank knows.
    assert [rank.admit(30, is_patient=False) for rank in ranks] == [""] * 3
    agreed(*ranks)
    for step in (30, 35, 40):
        assert [rank.admit(step, is_patient=True) for rank in ranks] == [
            "its window has lost the snapshot of step 25"
        ] * 3
    assert [rank.admit(45, is_patient=False) for rank in ranks] == [""] * 3
    # The window before it: a vote that was on its way when it ended.
    assert ranks[0].admit(20, is_patient=False) == ""


def test_without_room_on_one_rank_none_takes_a_snapshot_but_those_that_wait_for_it() -> None:
    ranks = [WindowLosses(PERIOD_STEPS) for _ in range(2)]
    agreed(*ranks, have_room=False)
    for rank in ranks:
        assert rank.admit(10, is_patient=False) == "a rank has not sent the snapshots before"
        assert rank.admit(10, is_patient=True) == ""
    agreed(*ranks)
    assert ranks[0].admit(10, is_patient=False) == ""


def test_a_resume_forgets_what_was_lost() -> None:
    losses = WindowLosses(PERIOD_STEPS)
    losses.lose(25)
    agreed(losses, have_room=False)
    losses.forget()
    assert losses.admit(30, is_patient=False) == ""
    agreed(losses)
    assert losses.admit(30, is_patient=False) == ""


@pytest.mark.parametrize(("num_lost", "is_told"), [(MIN_WINDOWS // 2, False), (MIN_WINDOWS // 2 + 1, True)])
def test_more_than_half_of_the_windows_lost_to_fast_steps_are_told_of_once(num_lost: int, is_told: bool) -> None:
    losses = WindowLosses(PERIOD_STEPS)
    losses.sent(1.5)
    warnings = []
    for window in range(2 * MIN_WINDOWS):
        losses.pass_snapshot(float(window))
        # Of every MIN_WINDOWS in a row, so many.
        if window % MIN_WINDOWS >= MIN_WINDOWS - num_lost:
            losses.outrun()
        warnings.append(losses.end_window())
    told = [warning for warning in warnings if warning]
    if not is_told:
        assert told == []
        return
    (warning,) = told
    assert warning.startswith(f"{num_lost} of {MIN_WINDOWS} windows were lost because steps outrun transfers")
    assert "due every 1 s, and sending the last one took 1.5 s; raise nowcaster.period_steps" in warning


def test_a_rank_that_always_has_room_leaves_the_telling_to_others() -> None:
    losses = WindowLosses(PERIOD_STEPS)
    for window in range(MIN_WINDOWS):
        agreed(losses, have_room=False)
        assert losses.has_room
        assert losses.admit(window * PERIOD_STEPS + 10, is_patient=False) != ""
        assert losses.end_window() == ""


class SlowCourier(FakeCourier):
    """Has sent a snapshot when the test says so."""

    after_post = SlotState.POSTED

    def take_slot(self) -> Slot | None:
        assert self.has_free_slot, "what all ranks have no room for, none asks for"
        return super().take_slot()

    def finish(self) -> None:
        self.slots[0].free()
        self.unread = [IN_TIME]


@pytest.mark.parametrize(("sent_after_steps", "num_warnings"), [(5, 0), (15, 1)])
def test_a_hook_whose_steps_outrun_its_uploads_leaves_snapshots_out_and_warns_once(
    sent_after_steps: int, num_warnings: int, caplog: pytest.LogCaptureFixture
) -> None:
    courier = SlowCourier()
    # Windows of two snapshots, ten steps apart.
    hook = new_hook(courier, FakePartition(), step=0)
    dropped: list[tuple[int, str]] = []
    hook.add_listener(
        lambda event: dropped.append((event.step, str(event.details["reason"]))) if event.kind == "dropped" else None
    )
    num_steps = 2 * MIN_WINDOWS * PERIOD_STEPS
    sent_at: list[int] = []
    with caplog.at_level(logging.WARNING, "sidecast"):
        for step in range(1, num_steps + 1):
            num_staged = hook.totals.num_staged
            if step in sent_at:
                courier.finish()
            hook.after_step(step)
            if hook.totals.num_staged > num_staged:
                sent_at.append(step + sent_after_steps)
    late_steps = list(range(20, num_steps + 1, 20)) if num_warnings else []
    assert dropped == [(step, "a rank has not sent the snapshots before") for step in late_steps]
    assert len([record for record in caplog.records if "outrun" in record.message]) == num_warnings


def test_a_snapshot_that_was_not_sent_ends_its_window() -> None:
    courier = FakeCourier()
    hook = new_hook(courier, FakePartition(), step=0)
    hook.after_step(10)
    courier.unread = [replace(IN_TIME, step=10, reason="not connected")]
    hook.after_step(11)
    hook.after_step(20)
    assert [message.step for message in courier.posted if isinstance(message, Snapshot)] == [10]
    assert (hook.totals.num_staged, hook.totals.num_dropped) == (1, 2)
    hook.after_step(30)
    assert hook.totals.num_staged == 2
