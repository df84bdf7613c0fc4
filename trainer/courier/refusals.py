"""What the service's answers to a failed call mean for a courier: one class per thing to do about it."""

from __future__ import annotations

import grpc

from sidecast.errors import SidecastError


class RefusedError(SidecastError):
    """The service understood and will not; asking again is of no use."""


class UnavailableError(SidecastError):
    """The service did not answer, not in time, or has no room; it may later."""


class ReopenError(SidecastError):
    """The service does not know the session: it was restarted."""


class OutdatedError(SidecastError):
    """The call does not fit the session's state: a stale epoch, an aborted snapshot, a replaced prediction."""


class ResendError(SidecastError):
    """The service lacks what the call refers to, shared memory or an earlier snapshot: send the bytes themselves."""


class CorruptError(SidecastError):
    """Bytes were damaged on the way; they can be sent again."""


_ERRORS: dict[grpc.StatusCode, type[SidecastError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: RefusedError,
    grpc.StatusCode.UNAUTHENTICATED: RefusedError,
    grpc.StatusCode.UNIMPLEMENTED: RefusedError,
    grpc.StatusCode.NOT_FOUND: ReopenError,
    grpc.StatusCode.FAILED_PRECONDITION: OutdatedError,
    grpc.StatusCode.DATA_LOSS: CorruptError,
    grpc.StatusCode.ABORTED: ResendError,
}


def translated(error: grpc.RpcError) -> SidecastError:
    """The error to raise instead of gRPC's."""
    code = error.code()
    return _ERRORS.get(code, UnavailableError)(f"{error.details()} ({code.name})")
