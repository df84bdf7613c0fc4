"""Fetches under way, and what each keeps on disk: of a session no more than the newest version and one before it.

And of read-outs no more than one, whatever has become of that since.
"""

from __future__ import annotations

from sidecast.nowcaster_service.errors import SaturatedError, WrongStateError
from sidecast.nowcaster_service.session_events import Prediction
from sidecast.nowcaster_service.vector_store import VectorFile


class Fetch:
    """One fetch, which keeps its vector; a context manager.

    Args:
        what: What is fetched, for messages.
        version: The prediction's; the step of a read-out.
        vector: Of it.
        fetches: Of the session.
    """

    def __init__(self, what: str, version: int, vector: VectorFile, fetches: set[Fetch]) -> None:
        self.version = version
        self._what = what
        self._vector = vector
        self._fetches = fetches
        self._is_over = False

    def __enter__(self) -> Fetch:
        self._vector.pin()
        self._fetches.add(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """Lets go of the vector, also while the client does not read: what it has not been sent, it will not be."""
        if not self._is_over:
            self._is_over = True
            self._fetches.discard(self)
            self._vector.unpin()

    def require(self) -> None:
        """Refuses to go on once the vector may hold something else.

        Raises:
            WrongStateError: The fetch was ended.
        """
        if self._is_over:
            raise WrongStateError(f"{self._what} is not published any more, and was fetched for too long")


class Fetches:
    """All fetches of all sessions."""

    def __init__(self) -> None:
        self._of_session: dict[str, set[Fetch]] = {}

    def begin(self, session_id: str, prediction: Prediction) -> Fetch:
        """A fetch of a prediction, to be entered at once."""
        task = prediction.task
        fetches = self._of_session.setdefault(session_id, set())
        return Fetch(f"version {task.version}", task.version, task.delta, fetches)

    def begin_alone(self, session_id: str, step: int, vector: VectorFile) -> Fetch:
        """A fetch of a read-out, to be entered at once.

        Raises:
            SaturatedError: The session has another one, and was promised room for one.
        """
        fetches = self._of_session.setdefault(session_id, set())
        if fetches:
            raise SaturatedError("another read-out of this run is being exported; try again once it is done")
        return Fetch(f"the read-out of step {step}", step, vector, fetches)

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
