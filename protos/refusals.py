"""Every refusal of the wire: its gRPC status, what the service means by it, what a client does about it.

Both sides read this table, and the enum ``RefusalKind`` of nowcast.proto says the same for other languages. A refusal
travels as its status, with the kind's name in the trailing metadata, since kinds share statuses. What gRPC itself
reports of a broken connection is no refusal; a client retries then.
"""

from __future__ import annotations

import enum

# Key of the trailing metadata; its value is the name of a kind.
REFUSAL_KEY = "sidecast-refusal"


class Remedy(enum.Enum):
    """What a client does about a refused call."""

    STOP = "stop"
    """Asks no more: this run is refused for good."""
    GIVE_UP = "give up"
    """Gives up the snapshot or the prediction that the call was about, and goes on with the next."""
    REOPEN = "reopen"
    """Opens and joins the session again, then repeats the call."""
    RESEND_IN_FULL = "resend in full"
    """Sends the same part again, as whole values and over the network."""
    RESEND = "resend"
    """Sends the same bytes again, a few times at most."""
    RETRY = "retry"
    """Repeats the call later, with back-off."""


class RefusalKind(enum.Enum):
    """Why a call was refused. Of the kinds with one status, the first is meant where none is named.

    Attributes:
        status: Name of the gRPC status code.
        remedy: What a client does.
        meaning: What the service means, as a sentence.
    """

    MALFORMED = ("INVALID_ARGUMENT", Remedy.STOP, "The request can never succeed as it is.")
    UNAUTHENTICATED = ("UNAUTHENTICATED", Remedy.STOP, "The call carries no token, or a wrong one.")
    INCOMPATIBLE = ("UNIMPLEMENTED", Remedy.STOP, "The service does not speak this version of the protocol.")
    UNKNOWN_SESSION = ("NOT_FOUND", Remedy.REOPEN, "There is no such session, for instance after a restart.")
    OUTDATED = ("FAILED_PRECONDITION", Remedy.GIVE_UP, "The call does not fit what the session has seen so far.")
    NOT_JOINED = (
        "FAILED_PRECONDITION",
        Remedy.REOPEN,
        "The rank has not joined this session, which is open.",
    )
    MISSING_REFERENCE = (
        "ABORTED",
        Remedy.RESEND_IN_FULL,
        "The service does not hold the memory or the earlier snapshot that the call refers to.",
    )
    CORRUPT = ("DATA_LOSS", Remedy.RESEND, "Bytes do not agree with their checksum.")
    SATURATED = ("RESOURCE_EXHAUSTED", Remedy.RETRY, "There is not enough room for it now.")
    FAILED = ("INTERNAL", Remedy.RETRY, "The service failed; its log says how.")
    FORBIDDEN = ("PERMISSION_DENIED", Remedy.STOP, "The run is protected, and the call does not carry its secret.")

    def __init__(self, status: str, remedy: Remedy, meaning: str) -> None:
        self.status = status
        self.remedy = remedy
        self.meaning = meaning


def refusal_kind(status: str, name: str | bytes | None) -> RefusalKind | None:
    """The kind of a refused call.

    Args:
        status: Name of its gRPC status code.
        name: What its trailing metadata hold under ``REFUSAL_KEY``; None for nothing, as from an older service.

    Returns:
        The kind of that name; the first of the status if the name is missing, or not one of the status's, as a newer
        service's may be; None if no refusal has this status.
    """
    of_status = [kind for kind in RefusalKind if kind.status == status]
    return next((kind for kind in of_status if kind.name == name), of_status[0] if of_status else None)
