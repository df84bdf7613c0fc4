"""What can go wrong, as data: one row per fault, for the service, the ranks and the test alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# Of the training run that all faults happen to.
CONTEXT_LEN = 2
INTERVAL_STEPS = 10
PERIOD_STEPS = CONTEXT_LEN * INTERVAL_STEPS

Call = Literal["Open", "Share", "Upload", "Commit", "Predict", "Watch", "Fetch", "Vote"]
Phase = Literal["before", "during", "after"]
Way = Literal["fp32", "bf16", "shared"]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault, and the point at which it fires.

    Attributes:
        what: What is done there: a strike of the conductor, who is waited for, or an alteration of what passes.
        call: The call in question; ``Share``, ``Predict`` and ``Vote`` are no calls on the wire, but have the same
            phases. ``Share`` is the handing over of a rank's buffers.
        phase: Before the work begins, half-way through it, or when it is done and not answered yet.
        rank: Only where this rank calls; None: whoever comes first.
        way: Only for uploads and fetches that travel so: as states, as bf16, or not at all, in memory that both have.
        times: How often it fires.
        is_at_base: Only for the last snapshot of a window.
        victims: Ranks whose couriers a strike means.
        seen: Part of a reason that some rank must give before the run may heal; empty: none need notice.
        logged: Part of what some process must log before that.
    """

    what: str
    call: Call
    phase: Phase = "during"
    rank: int | None = None
    way: Way | None = None
    times: int = 1
    is_at_base: bool = False
    victims: tuple[int, ...] = ()
    seen: str = ""
    logged: str = ""

    @property
    def begins_anew(self) -> bool:
        """Whether it takes a service that has just been started.

        Only one that does not know a session has it opened, and takes memory; one that has run for a while has files
        to spare.
        """
        return self.call in ("Open", "Share") or self.what == "fill the disk"

    @property
    def is_outrun(self) -> bool:
        """Whether steps must go on while it lasts: what is asked is what training does meanwhile."""
        return self.what in ("stop", "delay")

    @property
    def ends_sharing(self) -> bool:
        """Whether memory is shared no more afterwards, until a service is started that does not know the session."""
        return self.call == "Share" or self.what == "lose the memory"

    def __str__(self) -> str:
        times = "" if self.times == 1 else f"-{self.times}-times"
        way = "" if self.way is None else f"-{self.way}"
        return f"{self.what}-{self.phase}-{self.call}{way}{times}".lower().replace(" ", "-")
