"""Whose the open sessions are: asked before anything else of a call that names one."""

from __future__ import annotations

from sidecast.nowcaster_service.access.callers import Caller
from sidecast.nowcaster_service.access.owner import Owner
from sidecast.protos import nowcast_pb2 as pb


class Owners:
    """Owners by session; on one event loop, but for ``visible_runs``."""

    def __init__(self) -> None:
        self._owners: dict[str, Owner] = {}

    def begin(self, request: pb.OpenRequest, caller: Caller) -> None:
        """Makes a session that has just been opened its caller's."""
        self._owners[request.session_id] = Owner(request, caller)

    def end(self, session_id: str) -> None:
        """Forgets a session."""
        del self._owners[session_id]

    def require(self, session_id: str, caller: Caller) -> None:
        """Refuses a call that may not act for a session, if there is one.

        Raises:
            ForbiddenError: It shows another secret than the run's, or none, or is another tenant's.
        """
        if (owner := self._owners.get(session_id)) is not None:
            owner.require(caller)

    def require_for(self, request: pb.OpenRequest, caller: Caller) -> None:
        """Refuses to open a session of a run that is somebody else's, or one as something else than it is.

        Raises:
            ForbiddenError: The run, or the session, is open with another secret, or another tenant's.
            MalformedError: The session is open as something else.
        """
        for session_id, owner in self._owners.items():
            if session_id == request.session_id or owner.run_id == request.run_id:
                owner.require(caller)
        if request.session_id in self._owners:
            self._owners[request.session_id].require_same(request)

    def session_of(self, run_id: str, caller: Caller) -> str | None:
        """The open session of a run, for a call that may act for it; None if there is none.

        Raises:
            ForbiddenError: It shows another secret than the run's, or none, or is another tenant's.
        """
        for session_id, owner in self._owners.items():
            if owner.run_id == run_id:
                owner.require(caller)
                return session_id
        return None

    def is_shown_to(self, session_id: str, caller: Caller) -> bool:
        """Whether a call may learn a session's id: it is of no use to others once the run is protected."""
        return self._owners[session_id].admits(caller)

    def is_visible(self, session_id: str, caller: Caller) -> bool:
        """Whether a call may learn that there is such a session."""
        return caller.sees(self._owners[session_id].tenant)

    def tenant_of(self, session_id: str) -> str:
        """Whose run a session is of; empty where there are no tenants."""
        return self._owners[session_id].tenant

    def visible_runs(self, caller: Caller) -> set[str]:
        """Names of the runs that a caller may learn of; may be called from any thread."""
        return {owner.run_id for owner in list(self._owners.values()) if caller.sees(owner.tenant)}
