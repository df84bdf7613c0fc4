"""What the service refuses, one class per gRPC status; the servicer maps them, tracebacks never cross the wire."""

from sidecast.errors import SidecastError


class ServiceError(SidecastError):
    """The service refuses a request; the message names the thing, the value and what is allowed."""


class MalformedError(ServiceError):
    """The request can never succeed as it is (INVALID_ARGUMENT)."""


class WrongStateError(ServiceError):
    """The request does not fit what the session has seen so far (FAILED_PRECONDITION)."""


class MissingReferenceError(ServiceError):
    """The request refers to memory or to a snapshot that is not held here: send the bytes themselves (ABORTED)."""


class UnknownSessionError(ServiceError):
    """No such session, for instance after a restart of the service: open it again (NOT_FOUND)."""


class SaturatedError(ServiceError):
    """Not enough room for it (RESOURCE_EXHAUSTED)."""


class CorruptChunkError(ServiceError):
    """Bytes that do not agree with their checksum: send them again (DATA_LOSS)."""


class AddressError(ServiceError):
    """The service cannot listen where it was told to."""
