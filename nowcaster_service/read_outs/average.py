"""What a read-out has come to at one step."""

from __future__ import annotations

from dataclasses import dataclass

from sidecast.nowcaster_service.vector_store import VectorFile


@dataclass(frozen=True, kw_only=True)
class Average:
    """What a read-out has come to.

    Attributes:
        vector: Its values.
        digest: Of them; see ``vector_digest``.
        begin_step: Its states stand for the steps after this one,
        step: up to this one, that of the newest.
        num_snapshots: So many states are in it.
    """

    vector: VectorFile
    digest: int
    begin_step: int
    step: int
    num_snapshots: int
