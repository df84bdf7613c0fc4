"""Who hears of what happens in a session, and what each has to be told first."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from sidecast.nowcaster_service.session import Session
from sidecast.nowcaster_service.session_events import event_message, pause_message
from sidecast.protos import nowcast_pb2 as pb

Queue = asyncio.Queue[pb.SessionEvent | None]


class Watchers:
    """All watchers of all sessions; on one event loop."""

    def __init__(self) -> None:
        self._queues: dict[str, list[Queue]] = {}
        # Of sessions whose history has begun anew: what is told of it, and the ranks that have been.
        self._losses: dict[str, tuple[pb.SessionEvent, set[int]]] = {}

    def num_of(self, session_id: str) -> int:
        """How many watch a session."""
        return len(self._queues.get(session_id, ()))

    def tell(self, session_id: str, message: pb.SessionEvent) -> None:
        """Tells all who watch a session."""
        for queue in self._queues.get(session_id, []):
            queue.put_nowait(message)

    def tell_each_first(self, session_id: str, message: pb.SessionEvent) -> None:
        """Keeps something for each rank to be told when it first watches."""
        self._losses[session_id] = message, set()

    def end(self, session_id: str) -> None:
        """Ends all who watch a session."""
        self._losses.pop(session_id, None)
        for queue in self._queues.pop(session_id, []):
            queue.put_nowait(None)

    async def watch(self, session: Session, rank: int) -> AsyncGenerator[pb.SessionEvent, None]:
        """Yields the newest prediction, if there is one, and then everything that happens until the session ends.

        A rank is told first, once, what its session has lost by a restart of the service; and how it is with a pause
        that may have changed since the rank has joined.
        """
        session_id = session.settings.session_id
        queue: Queue = asyncio.Queue()
        queues = self._queues.setdefault(session_id, [])
        queues.append(queue)
        try:
            loss, told = self._losses.get(session_id, (None, set[int]()))
            if loss is not None and rank not in told:
                told.add(rank)
                yield loss
            if session.num_pause_changes:
                yield pause_message(session.is_paused)
            if session.prediction is not None:
                yield event_message(session.prediction)
            while (event := await queue.get()) is not None:
                yield event
        finally:
            queues.remove(queue)
