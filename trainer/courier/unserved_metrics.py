"""What a courier tells of its work, and who listens by default: nobody.

A rank whose metrics no port serves needs no series, and not the HTTP server that comes with them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

from sidecast.trainer.pipe.messages import Stats

SnapshotEnd = Literal["committed", "aborted", "unsent"]
TransferDirection = Literal["upload", "fetch"]


class Metrics(Protocol):
    """Hears of everything that a rank's series are made of."""

    def serve(self, port: int | None) -> int | None:
        """Serves the series over HTTP, on a free port if it is 0; says which, or None if none does."""

    def follow_link(self, is_connected: Callable[[], bool]) -> None:
        """Learns whom to ask whether the session is joined."""

    def begin_session(self, run_id: str) -> None:
        """Hears the run's name at the service; a resume may change it."""

    def update(self, stats: Stats) -> None:
        """Takes over what the hook has counted since it was attached, and its levels."""

    def count_snapshot(self, end: SnapshotEnd) -> None:
        """Hears how a snapshot ended."""

    def count_upload(self, num_bytes: int, seconds: float) -> None:
        """Hears of a part that the service has: its bytes, and how long upload and commit took."""

    def count_fetch(self, num_bytes: int, seconds: float) -> None:
        """Hears of a prediction that is here: its bytes, and how long the download took."""

    def count_resumed(self, direction: TransferDirection) -> None:
        """Hears that a transfer goes on after an interruption."""


class UnservedMetrics:
    """Metrics that nobody can ask for."""

    def serve(self, port: int | None) -> int | None:
        return None

    def follow_link(self, is_connected: Callable[[], bool]) -> None:
        pass

    def begin_session(self, run_id: str) -> None:
        pass

    def update(self, stats: Stats) -> None:
        pass

    def count_snapshot(self, end: SnapshotEnd) -> None:
        pass

    def count_upload(self, num_bytes: int, seconds: float) -> None:
        pass

    def count_fetch(self, num_bytes: int, seconds: float) -> None:
        pass

    def count_resumed(self, direction: TransferDirection) -> None:
        pass
