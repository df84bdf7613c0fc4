"""What the service refuses, one class per kind of refusal; the gRPC face maps them, tracebacks never cross the wire."""

from typing import ClassVar

from sidecast.errors import SidecastError
from sidecast.protos.refusals import RefusalKind


class ServiceError(SidecastError):
    """The service refuses a request; the message names the thing, the value and what is allowed.

    Attributes:
        kind: What this is on the wire.
    """

    kind: ClassVar[RefusalKind] = RefusalKind.MALFORMED


class MalformedError(ServiceError):
    """The request can never succeed as it is."""


class UnauthenticatedError(ServiceError):
    """The call carries no token, or a wrong one."""

    kind = RefusalKind.UNAUTHENTICATED


class ForbiddenError(ServiceError):
    """The run is protected, and the call does not carry its secret."""

    kind = RefusalKind.FORBIDDEN


class IncompatibleError(ServiceError):
    """The caller speaks a version of the protocol that the service does not."""

    kind = RefusalKind.INCOMPATIBLE


class UnknownSessionError(ServiceError):
    """No such session, for instance after a restart of the service: open it again."""

    kind = RefusalKind.UNKNOWN_SESSION


class WrongStateError(ServiceError):
    """The request does not fit what the session has seen so far."""

    kind = RefusalKind.OUTDATED


class NotJoinedError(WrongStateError):
    """The rank has not joined this session, which is open: join it first."""

    kind = RefusalKind.NOT_JOINED


class MissingReferenceError(ServiceError):
    """The request refers to memory or to a snapshot that is not held here: send the bytes themselves."""

    kind = RefusalKind.MISSING_REFERENCE


class CorruptChunkError(ServiceError):
    """Bytes that do not agree with their checksum: send them again."""

    kind = RefusalKind.CORRUPT


class SaturatedError(ServiceError):
    """Not enough room for it."""

    kind = RefusalKind.SATURATED


class EngineGoneError(SidecastError):
    """An engine died, or was ended, with a call unanswered."""


class ServiceLostError(SidecastError):
    """The service cannot go on, and does not come back by itself."""


class AddressError(SidecastError):
    """The service cannot listen where it was told to."""
