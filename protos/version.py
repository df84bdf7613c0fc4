"""Which versions of the protocol this code speaks; docs/adr/0017-how-the-protocol-changes.md says when they change."""

from __future__ import annotations

# Counts the changes that an older peer could not live with.
PROTOCOL_VERSION = 5
# 0 is what peers say that were built before there was a number: nothing that they read is gone.
OLDEST_VERSION = 0
# From this version on a run has a secret, which Open has to carry.
SECRET_VERSION = 3


def version_fault(peer: str, version: int) -> str:
    """Why a peer cannot be talked to.

    Args:
        peer: Who it is, "trainer" or "service".
        version: What it speaks.

    Returns:
        One sentence; empty if it can be.
    """
    if OLDEST_VERSION <= version <= PROTOCOL_VERSION:
        return ""
    return (
        f"the {peer} speaks version {version} of the protocol; this side speaks {OLDEST_VERSION} to "
        f"{PROTOCOL_VERSION}: install the same sidecast for both"
    )
