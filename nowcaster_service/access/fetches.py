"""Fetches under way, and what each keeps on disk: of a session no more than the newest version and one before it."""

from __future__ import annotations

from sidecast.nowcaster_service.errors import WrongStateError
from sidecast.nowcaster_service.session_events import Prediction


class Fetch:
    """One fetch of one rank, which keeps its prediction's vector; a context manager.

    Args:
        prediction: What is fetched.
        fetches: Of the session.
    """

    def __init__(self, prediction: Prediction, fetches: set[Fetch]) -> None:
        self.version = prediction.task.version
        self._delta = prediction.task.delta
        self._fetches = fetches
        self._is_over = False

    def __enter__(self) -> Fetch:
        self._delta.pin()
        self._fetches.add(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """Lets go of the vector, also while the client does not read: what it has not been sent, it will not be."""
        if not self._is_over:
            self._is_over = True
            self._fetches.discard(self)
            self._delta.unpin()

    def require(self) -> None:
        """Refuses to go on once the vector may hold something else.

        Raises:
            WrongStateError: The fetch was ended.
        """
        if self._is_over:
            raise WrongStateError(f"version {self.version} is not published any more, and was fetched for too long")


class Fetches:
    """All fetches of all sessions."""

    def __init__(self) -> None:
        self._of_session: dict[str, set[Fetch]] = {}

    def begin(self, session_id: str, prediction: Prediction) -> Fetch:
        """A fetch, to be entered at once."""
        return Fetch(prediction, self._of_session.setdefault(session_id, set()))

    def replace(self, session_id: str, version: int) -> None:
        """Ends those that keep more than the session was promised, now that a version was published."""
        fetches = self._of_session.get(session_id, set())
        kept = max((fetch.version for fetch in fetches if fetch.version != version), default=version)
        for fetch in [fetch for fetch in fetches if fetch.version not in (version, kept)]:
            fetch.end()

    def end(self, session_id: str) -> None:
        """Ends all of a session, whose history is promised to others now."""
        for fetch in list(self._of_session.pop(session_id, set())):
            fetch.end()
