"""Couriers on the service's own host hand over their buffers here; their bytes then need no network.

A Unix socket in the history folder, which only this user can enter. A courier shows the ticket that its Join was
answered with, and passes descriptors of its memory; nothing that it says is ever a path.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import mmap
import os
import secrets
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path

from sidecast.nowcaster_service.errors import ServiceError, UnknownSessionError
from sidecast.nowcaster_service.session_table import SessionTable
from sidecast.protos.local_socket import short_name

log = logging.getLogger(__name__)

SOCKET_NAME = "courier.sock"
TICKET_BYTES = 16
MAX_BUFFERS = 8
HANDOVER_S = 5.0
# Couriers of a host that are attended to side by side.
MAX_AT_ONCE = 64
# A courier shows its ticket as soon as it has it.
TICKET_S = 60.0
ACCEPTED = b"k"
_CREDENTIALS = struct.Struct("3i")


class HandoverError(ServiceError):
    """What a courier handed over cannot be used."""


class Handover:
    """Takes buffers, and gives them to the sessions they are for.

    Args:
        folder: Only this user's.
        sessions: Who uses the buffers.
        clock: Monotonic seconds.
    """

    def __init__(self, folder: Path, sessions: SessionTable, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.path = folder / SOCKET_NAME
        self._sessions = sessions
        self._clock = clock
        # In the order in which they were issued; a rank has one at most.
        self._tickets: dict[bytes, tuple[tuple[str, int], float]] = {}
        self._ticket_of: dict[tuple[str, int], bytes] = {}
        self._listener: socket.socket | None = None
        self._places = asyncio.Semaphore(MAX_AT_ONCE)
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Listens on the running event loop."""
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.setblocking(False)
        with short_name(self.path) as name:
            self._listener.bind(name)
        self.path.chmod(0o600)
        self._listener.listen()
        self._task = asyncio.get_running_loop().create_task(self._accept())

    async def stop(self) -> None:
        """Closes the socket; buffers that were handed over stay with their sessions."""
        if self._task is not None and self._listener is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._listener.close()
            self.path.unlink(missing_ok=True)

    def issue(self, session_id: str, rank: int) -> tuple[str, bytes]:
        """Where a rank can hand over its buffers, and the ticket for it; empty if nowhere."""
        if self._listener is None:
            return "", b""
        self.forget_old()
        # A rank that joins again has lost its former ticket.
        self._take_ticket(self._ticket_of.get((session_id, rank), b""))
        ticket = secrets.token_bytes(TICKET_BYTES)
        self._tickets[ticket] = (session_id, rank), self._clock()
        self._ticket_of[session_id, rank] = ticket
        return str(self.path), ticket

    @property
    def num_tickets(self) -> int:
        """How many are good."""
        return len(self._tickets)

    def forget_old(self) -> None:
        """Drops the tickets that a courier would have shown by now."""
        while self._tickets:
            ticket, (_, issued_s) = next(iter(self._tickets.items()))
            if self._clock() - issued_s <= TICKET_S:
                return
            self._take_ticket(ticket)

    def _take_ticket(self, ticket: bytes) -> tuple[str, int] | None:
        owner, _ = self._tickets.pop(ticket, (None, 0.0))
        if owner is not None:
            del self._ticket_of[owner]
        return owner

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        assert self._listener is not None
        async with asyncio.TaskGroup() as taking:
            while True:
                await self._places.acquire()
                connection, _ = await loop.sock_accept(self._listener)
                # Others do not wait for one that says nothing.
                taking.create_task(self._attend(connection))

    async def _attend(self, connection: socket.socket) -> None:
        try:
            with connection:
                await asyncio.wait_for(self._take(connection), HANDOVER_S)
        except Exception as error:
            # Whatever it is: the next courier is not to suffer for it. This one notices the missing answer and uses
            # the network.
            log.warning("a courier's buffers were not taken: %s", error or type(error).__name__)
        finally:
            self._places.release()

    async def _take(self, connection: socket.socket) -> None:
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        _, user, _ = _CREDENTIALS.unpack(credentials)
        if user != os.geteuid():
            raise HandoverError(f"user {user} is not this service's")
        connection.setblocking(False)
        await _readable(connection)
        ticket, descriptors, _, _ = socket.recv_fds(connection, TICKET_BYTES, MAX_BUFFERS)
        try:
            self.forget_old()
            owner = self._take_ticket(ticket)
            if owner is None:
                raise HandoverError("the ticket is not one of ours, or was used before")
            session_id, rank = owner
            with contextlib.suppress(UnknownSessionError):
                self._sessions.get(session_id).share(rank, [_mapped(descriptor) for descriptor in descriptors])
                await asyncio.get_running_loop().sock_sendall(connection, ACCEPTED)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)


async def _readable(connection: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    is_readable = asyncio.Event()
    loop.add_reader(connection, is_readable.set)
    try:
        await is_readable.wait()
    finally:
        loop.remove_reader(connection)


def _mapped(descriptor: int) -> memoryview:
    try:
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    except OSError as error:
        raise HandoverError(f"a descriptor is no shared memory: {error.strerror}") from error
    if not seals & fcntl.F_SEAL_SHRINK:
        # Reading memory that its owner has cut off would kill the service.
        raise HandoverError("a buffer is not sealed against shrinking")
    num_bytes = os.fstat(descriptor).st_size
    if num_bytes == 0:
        raise HandoverError("a buffer is empty")
    return memoryview(mmap.mmap(descriptor, num_bytes))
