"""Which windows have lost a snapshot: known to all ranks from their votes, so that all leave out the same snapshots.

A window is the snapshots of one period; without one of them it makes no nowcast. Ranks whose steps outrun their
transfers would otherwise each lose another snapshot of it, and send the rest for nothing, into the next window's way.
"""

from __future__ import annotations

from sidecast.trainer.hook.vote import NO_STEP, Decision

# A run's first windows meet a service that is still preparing.
MIN_WINDOWS = 4


class WindowLosses:
    """What is known of lost snapshots, and of the room for others.

    Args:
        period_steps: Length of a window in optimizer steps.
        setting: That says how long it is.

    Attributes:
        newest_step: Of the newest snapshot that this rank knows to be lost; NO_STEP if it knows of none.
        has_room: Whether this rank had a slot free for another snapshot when it voted last.
    """

    def __init__(self, period_steps: int, setting: str = "nowcaster.period_steps") -> None:
        self.newest_step = NO_STEP
        self.has_room = True
        self._period_steps = period_steps
        self._setting = setting
        self._agreed_step = NO_STEP
        self._have_room = True
        self._num_windows = 0
        self._num_outrun = 0
        self._is_outrun = False
        self._lacked_room = False
        self._is_told = False
        self._sent_s = 0.0
        self._staged_at_s: float | None = None
        self._interval_s = 0.0

    def _window(self, step: int) -> int:
        # A window ends with its base step.
        return (step - 1) // self._period_steps

    def lose(self, step: int) -> None:
        """Takes note of a snapshot that this rank could not stage or send, or that the service has given up."""
        self.newest_step = max(self.newest_step, step)

    def agree(self, decision: Decision) -> None:
        """Takes note of what all ranks have said."""
        self._agreed_step = max(self._agreed_step, decision.lost_step)
        self._have_room = decision.have_room

    def sent(self, seconds: float) -> None:
        """Takes note of how long a snapshot took."""
        self._sent_s = seconds

    def admit(self, step: int, *, is_patient: bool) -> str:
        """Decides whether ranks take the snapshot of a step, the same on all of them.

        Args:
            step: Of the snapshot.
            is_patient: Whether ranks wait until they have room.

        Returns:
            Why none of them does; empty if all do.
        """
        if self._agreed_step != NO_STEP and self._window(self._agreed_step) == self._window(step):
            return f"its window has lost the snapshot of step {self._agreed_step}"
        if not self._have_room and not is_patient:
            self._is_outrun = True
            self._lacked_room |= not self.has_room
            return "a rank has not sent the snapshots before"
        return ""

    def outrun(self) -> None:
        """Takes note that this rank had no room for a snapshot, although it had waited."""
        self._is_outrun = self._lacked_room = True

    def pass_snapshot(self, now_s: float) -> None:
        """Takes note of the time of a snapshot step."""
        if self._staged_at_s is not None:
            self._interval_s = now_s - self._staged_at_s
        self._staged_at_s = now_s

    def end_window(self) -> str:
        """Counts a window at its base step.

        Returns:
            What a user should know, once; empty otherwise.
        """
        self._num_windows += 1
        self._num_outrun += self._is_outrun
        self._is_outrun = False
        is_due = self._lacked_room and self._num_windows >= MIN_WINDOWS and 2 * self._num_outrun > self._num_windows
        if not is_due or self._is_told:
            return ""
        self._is_told = True
        return (
            f"{self._num_outrun} of {self._num_windows} windows were lost because steps outrun transfers: a snapshot "
            f"is due every {self._interval_s:.3g} s, and sending the last one took {self._sent_s:.3g} s; "
            f"raise {self._setting} (see 'Fast steps' in docs/settings.md)"
        )

    def forget(self) -> None:
        """Begins anew after a checkpoint was loaded."""
        self.newest_step = self._agreed_step = NO_STEP
        self.has_room = self._have_room = True
