"""What the hook tells whoever listens on the training thread."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

EventKind = Literal[
    "staged",
    "dropped",
    "committed",
    "applied",
    "accepted",
    "rolled_back",
    "rollback_delayed",
    "rejected",
    "failed",
    "suspended",
    "connected",
    "disconnected",
]


@dataclass(frozen=True)
class NowcastEvent:
    """One thing that happened.

    Attributes:
        kind: What. A nowcast that was made and not applied is ``rejected``, one that was never made ``failed``; a
            rollback that had to be put off until every rank can carry it out is ``rollback_delayed``.
        step: The optimizer step at which this rank learned of it.
        details: Numbers and reasons; for ``applied``: version, base_step, staleness_steps, horizon_intervals,
            weight, digest, relative_norm, nowcast_s.
    """

    kind: EventKind
    step: int
    details: Mapping[str, float | int | str] = field(default_factory=dict)
