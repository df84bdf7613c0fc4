"""What the hook has done and what it has cost."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Totals:
    """Since the hook was attached; seconds, bytes and counts, and the seconds of each nowcast."""

    blocked_s: float = 0.0
    staging_s: float = 0.0
    bytes_uploaded: int = 0
    bytes_fetched: int = 0
    num_staged: int = 0
    num_committed: int = 0
    num_dropped: int = 0
    num_applied: int = 0
    num_accepted: int = 0
    num_rolled_back: int = 0
    num_rejected: int = 0
    num_failed: int = 0
    nowcast_s: list[float] = field(default_factory=list)
