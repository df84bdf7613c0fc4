"""Hands this rank's buffers to a service on the same host, so that their bytes need no network."""

from __future__ import annotations

import logging
import os
import socket
import stat
import struct
from collections.abc import Sequence
from pathlib import Path

from sidecast.protos.local_socket import short_name

log = logging.getLogger(__name__)

HANDOVER_S = 5.0
ACCEPTED = b"k"
_CREDENTIALS = struct.Struct("3i")


def hand_over(endpoint: str, socket_path: str, ticket: bytes, descriptors: Sequence[int]) -> bool:
    """Passes descriptors of shared memory to the service.

    Args:
        endpoint: HOST:PORT where the service was found; it must be this host.
        socket_path: Where the service says that it takes buffers; empty: it does not.
        ticket: To be shown there.
        descriptors: Of this rank's staging buffers, then of its prediction buffer; none: they are not shared.

    Returns:
        Whether the service has them; everything goes over the network otherwise.
    """
    if not socket_path or not descriptors or not is_this_host(endpoint) or not _is_ours(Path(socket_path)):
        return False
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(HANDOVER_S)
            with short_name(Path(socket_path)) as name:
                connection.connect(name)
            credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            if _CREDENTIALS.unpack(credentials)[1] != os.geteuid():
                return False
            socket.send_fds(connection, [ticket], list(descriptors))
            return connection.recv(len(ACCEPTED)) == ACCEPTED
    except OSError as error:
        log.info("the service on this host does not take our buffers (%s); they go over the network", error)
        return False


def is_this_host(endpoint: str) -> bool:
    """Whether an endpoint's address is one of this host's: only those can be bound to."""
    host = endpoint.rpartition(":")[0].strip("[]")
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_DGRAM)
    except OSError:
        return False
    for family, _, _, _, address in found:
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.bind(address)
                return True
        except OSError:
            continue
    return False


def _is_ours(path: Path) -> bool:
    """Whether nobody else can have put this socket there."""
    try:
        found, folder = os.lstat(path), os.lstat(path.parent)
    except OSError:
        # A service in another container, whose folders are not ours.
        return False
    user = os.geteuid()
    is_private = folder.st_uid == user and stat.S_ISDIR(folder.st_mode) and stat.S_IMODE(folder.st_mode) & 0o077 == 0
    return is_private and found.st_uid == user and stat.S_ISSOCK(found.st_mode)
