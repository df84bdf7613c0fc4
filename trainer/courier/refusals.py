"""What the service's answers to a failed call mean for a courier: one class per thing to do about it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import grpc

from sidecast.errors import SidecastError
from sidecast.protos.refusals import REFUSAL_KEY, Remedy, refusal_kind

# What gRPC says of a message beyond a limit on either side.
MESSAGE_TOO_LARGE = "larger than max"


class RefusedError(SidecastError):
    """The service understood and will not; asking again is of no use."""


class UnavailableError(SidecastError):
    """The service did not answer, not in time, or has no room; it may later."""


class ReopenError(SidecastError):
    """The service does not know the session, since it was restarted, or not yet this rank in it."""


class OutdatedError(SidecastError):
    """The call does not fit the session's state: a stale epoch, an aborted snapshot, a replaced prediction."""


class ResendError(SidecastError):
    """The service lacks what the call refers to, shared memory or an earlier snapshot: send the bytes themselves."""


class CorruptError(SidecastError):
    """Bytes were damaged on the way; they can be sent again."""


ERRORS: dict[Remedy, type[SidecastError]] = {
    Remedy.STOP: RefusedError,
    Remedy.GIVE_UP: OutdatedError,
    Remedy.REOPEN: ReopenError,
    Remedy.RESEND_IN_FULL: ResendError,
    Remedy.RESEND: CorruptError,
    Remedy.RETRY: UnavailableError,
}


def translated(error: grpc.RpcError) -> SidecastError:
    """The error to raise instead of gRPC's."""
    code = error.code()
    metadata: Iterable[Any] = error.trailing_metadata() or ()
    name = dict(metadata).get(REFUSAL_KEY)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and name is None and MESSAGE_TOO_LARGE in (error.details() or ""):
        # gRPC's own, which has no other mark: as large again, it would be refused again.
        return RefusedError(f"{error.details()}: a model of so many tensors does not fit into one message")
    kind = refusal_kind(code.name, name)
    remedy = Remedy.RETRY if kind is None else kind.remedy
    return ERRORS[remedy](f"{error.details()} ({code.name})")
