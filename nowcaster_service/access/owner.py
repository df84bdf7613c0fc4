"""Whose session it is: the secret of its run, and what it was opened with."""

from __future__ import annotations

import hashlib
import hmac

from sidecast.nowcaster_service.access.callers import Caller
from sidecast.nowcaster_service.errors import ForbiddenError, MalformedError
from sidecast.protos import nowcast_pb2 as pb
from sidecast.protos.transport import MAX_RUN_SECRET_CHARACTERS, MIN_RUN_SECRET_CHARACTERS
from sidecast.protos.version import SECRET_VERSION


def check_secret(secret: str, protocol_version: int) -> None:
    """Refuses a secret that anybody could guess, and none from a trainer that knows of secrets.

    Raises:
        MalformedError: It is missing, or of another length than is allowed; the message does not hold it.
    """
    if not secret and protocol_version < SECRET_VERSION:
        return
    if not MIN_RUN_SECRET_CHARACTERS <= len(secret) <= MAX_RUN_SECRET_CHARACTERS:
        raise MalformedError(
            f"the run's secret has {len(secret)} characters; allowed: {MIN_RUN_SECRET_CHARACTERS} to "
            f"{MAX_RUN_SECRET_CHARACTERS}"
        )


class Owner:
    """Who opened a session.

    Args:
        request: The announcement.
        caller: Who made it; without a secret for a run that is not protected, as of older trainers.

    Attributes:
        run_id: Of the run.
        tenant: Whose run it is; empty where there are no tenants.
        can_pause: Whether its trainer knows of pauses.
    """

    def __init__(self, request: pb.OpenRequest, caller: Caller) -> None:
        self._opened = _without_model(request)
        self._digest = _digest(caller.secret) if caller.secret else b""
        self.run_id = request.run_id
        self.tenant = caller.tenant
        self.can_pause = request.can_pause

    def admits(self, caller: Caller) -> bool:
        """Whether a call may act for the run."""
        # In constant time: the time of a plain comparison tells how much of a guess is right.
        has_secret = not self._digest or hmac.compare_digest(_digest(caller.secret), self._digest)
        return has_secret and caller.tenant == self.tenant

    def require(self, caller: Caller) -> None:
        """Refuses a call that may not act for the run.

        Raises:
            ForbiddenError: It is another tenant's, or carries another secret, or none.
        """
        if caller.tenant != self.tenant:
            raise ForbiddenError(f"run {self.run_id} is another tenant's")
        if not self.admits(caller):
            given = "another secret" if caller.secret else "no secret"
            raise ForbiddenError(f"run {self.run_id} is protected; the call carries {given}")

    def require_same(self, request: pb.OpenRequest) -> None:
        """Refuses to open the session once more as something else.

        Raises:
            MalformedError: A field differs, named with both values.
        """
        again = _without_model(request)
        if again.schema_hash != self._opened.schema_hash:
            raise MalformedError(f"session {request.session_id} is already open for another model")
        for item in pb.OpenRequest.DESCRIPTOR.fields:
            was, now = getattr(self._opened, item.name), getattr(again, item.name)
            if was != now:
                raise MalformedError(
                    f"session {request.session_id} is already open with another {item.name}: {_shown(was)}, not "
                    f"{_shown(now)}"
                )


def announcement_digest(request: pb.OpenRequest) -> str:
    """Names what a session was opened with, its model apart, in hexadecimal digits."""
    return hashlib.sha256(_without_model(request).SerializeToString(deterministic=True)).hexdigest()


def _without_model(request: pb.OpenRequest) -> pb.OpenRequest:
    # The schema's hash says the same in a few bytes.
    kept = pb.OpenRequest()
    kept.CopyFrom(request)
    kept.ClearField("manifest")
    return kept


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


def _shown(value: object) -> str:
    return " ".join(f"{value}".split())[:100] or "nothing"
