"""Whose the open sessions are: asked before anything else of a call that names one."""

from __future__ import annotations

from sidecast.nowcaster_service.access.callers import Caller
from sidecast.nowcaster_service.access.owner import Owner
from sidecast.nowcaster_service.errors import ForbiddenError, WrongStateError
from sidecast.protos import nowcast_pb2 as pb


class Owners:
    """Owners by session; on one event loop, but for ``visible_runs``.

    Args:
        by_token: Whether a tenant's token is enough to pause its runs; else their secrets are needed.
    """

    def __init__(self, *, by_token: bool = False) -> None:
        self._by_token = by_token
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

    def to_pause(self, run_id: str, caller: Caller) -> str | None:
        """The open session of a run, for a call that may pause it; None if there is none.

        Raises:
            ForbiddenError: It may not, which the message explains.
            WrongStateError: The run's trainer would go on as if nothing had been said.
        """
        for session_id, owner in self._owners.items():
            if owner.run_id == run_id:
                if caller.secret or owner.tenant != caller.tenant:
                    owner.require(caller)
                elif not self._by_token and not owner.admits(caller):
                    raise ForbiddenError(
                        f"run {run_id} is protected; allowed: whoever shows its secret, as of its run file, or, where "
                        "the service has --page-control, its tenant"
                    )
                if not owner.can_pause:
                    raise WrongStateError(f"run {run_id} cannot be paused: its trainer has an older sidecast")
                return session_id
        return None

    def may_pause(self, session_id: str, caller: Caller) -> bool:
        """Whether a call may pause a session's run without its secret."""
        owner = self._owners[session_id]
        return self._by_token and owner.can_pause and owner.tenant == caller.tenant

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
