"""All ranks agree on what to apply: one small collective on a CPU group, launched at one step and read at a later one.

Every rank votes at every vote step, whatever its state. Nobody asks whether a vote has completed: ranks would
then act on different steps. It is launched at step s and awaited at s + lag, by when it has long been over.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist

NO_VERSION = -1
NO_STEP = -1
_FIELDS = 8


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
    """

    version: int = NO_VERSION
    digest: int = 0
    epoch: int = 0
    loss_sum: float = 0.0
    num_losses: int = 0
    weight_scale: float = 1.0
    has_room: bool = True
    lost_step: int = NO_STEP

    def encode(self) -> list[int]:
        loss_bits, scale_bits = struct.unpack("<qq", struct.pack("<dd", self.loss_sum, self.weight_scale))
        agreement = [self.version, self.digest, self.epoch]
        return [*agreement, loss_bits, self.num_losses, scale_bits, int(self.has_room), self.lost_step]

    @classmethod
    def decode(cls, row: Sequence[int]) -> Ballot:
        loss_sum, weight_scale = struct.unpack("<dd", struct.pack("<qq", row[3], row[5]))
        return cls(row[0], row[1], row[2], loss_sum, row[4], weight_scale, bool(row[6]), row[7])


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
    """

    version: int
    digest: int
    epoch: int
    mean_loss: float | None
    num_losses: int
    weight_scale: float
    have_room: bool
    lost_step: int


def decide(ballots: Sequence[Ballot]) -> Decision:
    """Counts the ballots of all ranks."""
    first = ballots[0]
    is_unanimous = all(
        (item.version, item.digest, item.epoch) == (first.version, first.digest, first.epoch) for item in ballots
    )
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
    )


class Votes(Protocol):
    """Where a rank votes; one vote at a time."""

    @property
    def is_open(self) -> bool:
        """Whether a vote has been launched and not read yet."""

    def launch(self, ballot: Ballot) -> None:
        """Casts this rank's ballot without waiting for the others."""

    def abandon(self, timeout_s: float) -> None:
        """Lets go of a launched vote, which a rank that has failed may never cast; waits a little for its end."""

    def read(self) -> Decision:
        """Waits for the launched vote and counts it."""

    def confirm(self, is_ready: bool) -> bool:
        """Whether every rank is ready to do what the last vote decided; waits for all of them.

        Rare, unlike votes: once for each jump and for each rollback.
        """


class SoloVotes:
    """The votes of a process that trains alone."""

    def __init__(self) -> None:
        self._ballot: Ballot | None = None

    @property
    def is_open(self) -> bool:
        return self._ballot is not None

    def launch(self, ballot: Ballot) -> None:
        assert self._ballot is None
        self._ballot = ballot

    def abandon(self, timeout_s: float) -> None:
        self._ballot = None

    def read(self) -> Decision:
        assert self._ballot is not None
        ballot, self._ballot = self._ballot, None
        return decide([ballot])

    def confirm(self, is_ready: bool) -> bool:
        return is_ready


class VoteBox:
    """Runs votes over a process group of its own, so that they never mix with the trainer's collectives.

    Args:
        group: A gloo group of all ranks.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._rank = dist.get_rank(group)
        # A sum over rows that are zero but for one's own is a gather, and runs in place.
        self._rows = torch.zeros(dist.get_world_size(group), _FIELDS, dtype=torch.int64)
        self._ready = torch.zeros(1, dtype=torch.int64)
        self._work: dist.Work | None = None

    @property
    def is_open(self) -> bool:
        return self._work is not None

    def launch(self, ballot: Ballot) -> None:
        assert self._work is None
        self._rows.zero_()
        self._rows[self._rank] = torch.tensor(ballot.encode(), dtype=torch.int64)
        self._work = dist.all_reduce(self._rows, group=self._group, async_op=True)

    def confirm(self, is_ready: bool) -> bool:
        assert self._work is None
        self._ready[0] = int(is_ready)
        dist.all_reduce(self._ready, dist.ReduceOp.MIN, group=self._group)
        return bool(self._ready)

    def abandon(self, timeout_s: float) -> None:
        work, self._work = self._work, None
        if work is not None:
            with contextlib.suppress(RuntimeError):
                work.wait(timedelta(seconds=timeout_s))

    def read(self) -> Decision:
        assert self._work is not None
        self._work.wait()
        self._work = None
        return decide([Ballot.decode(row) for row in self._rows.tolist()])
