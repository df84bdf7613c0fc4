"""All ranks agree on what to apply: one small collective on a CPU group, launched at one step and read at a later one.

All collectives of the group are rounds of one shape: votes, confirmations, and the last ballot of a rank that leaves.
So it meets the others in whichever round is their next, where they find that it leaves, and nobody waits for ever.

Every rank votes at every vote step, whatever its state. Nobody asks whether a vote has completed: ranks would
then act on different steps. It is launched at step s and awaited at s + lag, by when it has long been over.
"""

from __future__ import annotations

import contextlib
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist

NO_VERSION = -1
NO_STEP = -1
NO_VALUES = (0, 0)
ANOTHER_RANK = "another rank could not prepare for it"
OTHER_VALUES = "ranks hold other values of the same parameters; put DistributedDataParallel around the model"
_FIELDS = 11
_POLL_S = 0.005


@dataclass(frozen=True, slots=True)
class Ballot:
    """What one rank says.

    Attributes:
        version: Prediction that it holds, whole and checked; NO_VERSION for none.
        digest: Of that prediction, 63 bits.
        epoch: Epoch of that prediction's base.
        loss_sum: Sum of its micro-batch losses since its last ballot.
        num_losses: How many those are.
        weight_scale: What it would leave of the jump's weight, 0 to 1.
        has_room: Whether it has a slot free for the next snapshot.
        lost_step: Of the newest snapshot that it knows to be lost; NO_STEP for none.
        is_ready: In a confirmation, whether it can do what was decided.
        is_leaving: Whether this is its last ballot.
        is_paused: Whether it has heard that nothing is to be applied.
    """

    version: int = NO_VERSION
    digest: int = 0
    epoch: int = 0
    loss_sum: float = 0.0
    num_losses: int = 0
    weight_scale: float = 1.0
    has_room: bool = True
    lost_step: int = NO_STEP
    is_ready: bool = True
    is_leaving: bool = False
    is_paused: bool = False

    def encode(self) -> list[int]:
        loss_bits, scale_bits = struct.unpack("<qq", struct.pack("<dd", self.loss_sum, self.weight_scale))
        agreement = [self.version, self.digest, self.epoch]
        flags = [int(self.is_ready), int(self.is_leaving), int(self.is_paused)]
        return [*agreement, loss_bits, self.num_losses, scale_bits, int(self.has_room), self.lost_step, *flags]

    @classmethod
    def decode(cls, row: Sequence[int]) -> Ballot:
        loss_sum, weight_scale = struct.unpack("<dd", struct.pack("<qq", row[3], row[5]))
        version, digest, epoch, _, num_losses, _, has_room, lost_step, *flags = row
        return cls(
            version, digest, epoch, loss_sum, num_losses, weight_scale, bool(has_room), lost_step, *map(bool, flags)
        )


@dataclass(frozen=True, slots=True)
class Decision:
    """What all ranks read from one vote: the same everywhere.

    Attributes:
        version: The version that every rank holds with one digest and epoch; NO_VERSION if they differ.
        digest: Its digest.
        epoch: Its epoch.
        mean_loss: Over all micro-batches of all ranks; None if nobody saw any.
        num_losses: How many those were.
        weight_scale: The least that any rank would leave of the jump's weight.
        have_room: Whether every rank has a slot free for the next snapshot.
        lost_step: Of the newest snapshot that any rank knows to be lost; NO_STEP for none.
        is_paused: Whether any rank has heard that nothing is to be applied, and not yet that it may be again.
    """

    version: int
    digest: int
    epoch: int
    mean_loss: float | None
    num_losses: int
    weight_scale: float
    have_room: bool
    lost_step: int
    is_paused: bool


def decide(ballots: Sequence[Ballot]) -> Decision:
    """Counts the ballots of all ranks."""
    first = ballots[0]
    is_unanimous = all(
        (item.version, item.digest, item.epoch) == (first.version, first.digest, first.epoch) for item in ballots
    )
    # A rank that leaves holds nothing, so that nothing is decided with it.
    num_losses = sum(item.num_losses for item in ballots)
    return Decision(
        version=first.version if is_unanimous else NO_VERSION,
        digest=first.digest if is_unanimous else 0,
        epoch=first.epoch if is_unanimous else 0,
        mean_loss=sum(item.loss_sum for item in ballots) / num_losses if num_losses else None,
        num_losses=num_losses,
        weight_scale=min(item.weight_scale for item in ballots),
        have_room=all(item.has_room for item in ballots),
        lost_step=max(item.lost_step for item in ballots),
        is_paused=any(item.is_paused for item in ballots),
    )


class Votes(Protocol):
    """Where a rank votes; one vote at a time."""

    @property
    def is_open(self) -> bool:
        """Whether a vote has been launched and not read yet."""

    def launch(self, ballot: Ballot) -> None:
        """Casts this rank's ballot without waiting for the others; opens no vote once a rank has left."""

    @property
    def left_rank(self) -> int | None:
        """The rank that was found to have left, or this one; None while all are there. There are no votes after it."""

    def leave(self, timeout_s: float) -> Decision | None:
        """Ends voting for all ranks; waits a little for those that leave, too, but for none that has failed.

        Returns:
            What the vote that was open would have decided; None if there was none, or it did not end.
        """

    def read(self) -> Decision:
        """Waits for the launched vote and counts it."""

    def peek(self) -> Decision:
        """As ``read``, and leaves the vote to be read later."""

    def confirm(self, is_ready: bool, values: tuple[int, int] = NO_VALUES) -> str:
        """Asks whether every rank is ready to do what the last vote decided; waits for all of them.

        Rare, unlike votes: once for each jump and for each rollback.

        Args:
            is_ready: Whether this one is.
            values: What it holds, and a digest of its values, 63 bits each: who holds the same must hold the same
                values. NO_VALUES where that is not to be compared.

        Returns:
            Why nobody may go on, the same on all ranks that are ready; empty if all may.
        """


class SoloVotes:
    """The votes of a process that trains alone."""

    left_rank: int | None = None

    def __init__(self) -> None:
        self._ballot: Ballot | None = None

    @property
    def is_open(self) -> bool:
        return self._ballot is not None

    def launch(self, ballot: Ballot) -> None:
        assert self._ballot is None
        self._ballot = ballot

    def leave(self, timeout_s: float) -> Decision | None:
        return self.read() if self.is_open else None

    def read(self) -> Decision:
        assert self._ballot is not None
        ballot, self._ballot = self._ballot, None
        return decide([ballot])

    def peek(self) -> Decision:
        assert self._ballot is not None
        return decide([self._ballot])

    def confirm(self, is_ready: bool, values: tuple[int, int] = NO_VALUES) -> str:
        return "" if is_ready else ANOTHER_RANK


class VoteBox:
    """Runs votes over a process group of its own, so that they never mix with the trainer's collectives.

    Args:
        group: A gloo group of all ranks.
        owns_group: Whether the group ends with the votes.
    """

    def __init__(self, group: dist.ProcessGroup, *, owns_group: bool = False) -> None:
        self.left_rank: int | None = None
        self._group = group
        self._owns_group = owns_group
        self._rank = dist.get_rank(group)
        self._size = dist.get_world_size(group)
        self._rows, self._last_rows = (torch.zeros(self._size, _FIELDS, dtype=torch.int64) for _ in range(2))
        self._work: dist.Work | None = None

    @property
    def is_open(self) -> bool:
        return self._work is not None

    def launch(self, ballot: Ballot) -> None:
        assert self._work is None
        if self.left_rank is None:
            self._work = self._cast(ballot, self._rows)

    def confirm(self, is_ready: bool, values: tuple[int, int] = NO_VALUES) -> str:
        assert self._work is None
        if self.left_rank is not None:
            return ANOTHER_RANK
        held, digest = values
        self._work = self._cast(Ballot(is_ready=is_ready, version=held, digest=digest), self._rows)
        ballots = self._count()
        if self.left_rank is not None or not all(ballot.is_ready for ballot in ballots):
            return ANOTHER_RANK
        digests: dict[int, int] = {}
        are_equal = all(digests.setdefault(ballot.version, ballot.digest) == ballot.digest for ballot in ballots)
        return "" if are_equal else OTHER_VALUES

    def read(self) -> Decision:
        return decide(self._count())

    def peek(self) -> Decision:
        work = self._work
        decision = decide(self._count())
        self._work = work
        return decision

    def leave(self, timeout_s: float) -> Decision | None:
        last_vote = self._work
        works = [] if last_vote is None else [last_vote]
        if self.left_rank is None:
            self.left_rank = self._rank
            # Of a rank that failed, the group knows before the round begins.
            with contextlib.suppress(RuntimeError):
                works.append(self._cast(Ballot(is_leaving=True), self._last_rows))
        deadline_s = time.monotonic() + timeout_s
        while not all(work.is_completed() for work in works) and time.monotonic() < deadline_s:
            time.sleep(_POLL_S)
        decision = None
        with contextlib.suppress(RuntimeError):
            decision = self.read() if last_vote is not None and last_vote.is_completed() else None
        self._work = None
        if self._owns_group and all(work.is_completed() for work in works):
            end_group(self._group)
        return decision

    def _cast(self, ballot: Ballot, rows: torch.Tensor) -> dist.Work:
        # A sum over rows that are zero but for one's own is a gather, and runs in place.
        rows.zero_()
        rows[self._rank] = torch.tensor(ballot.encode(), dtype=torch.int64)
        work = dist.all_reduce(rows, group=self._group, async_op=True)
        assert work is not None
        return work

    def _count(self) -> list[Ballot]:
        assert self._work is not None
        self._work.wait()
        self._work = None
        ballots = [Ballot.decode(row) for row in self._rows.tolist()]
        self.left_rank = next((rank for rank, ballot in enumerate(ballots) if ballot.is_leaving), self.left_rank)
        return ballots


def end_group(group: dist.ProcessGroup) -> None:
    """Gives a group's threads and descriptors back; nothing if that was done already."""
    with contextlib.suppress(ValueError, RuntimeError, AssertionError):
        dist.destroy_process_group(group)
