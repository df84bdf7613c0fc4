"""Small messages between a training rank and its courier, over a socket pair.

The trainer's end never blocks: what a courier that does not read (stopped, dying) is told waits in memory, within
bounds. Frames are a 4-byte length and an encoded message.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

from sidecast.trainer.pipe.encoding import decode, encode
from sidecast.trainer.pipe.messages import ToCourier, ToHook

Outgoing = TypeVar("Outgoing", bound=ToCourier | ToHook)
Incoming = TypeVar("Incoming", bound=ToCourier | ToHook)

_LENGTH = struct.Struct("<I")
# What a courier that does not read may leave unread here; a stopped one gets a few messages per snapshot.
MAX_UNSENT_BYTES = 16 << 20
_READ_BYTES = 1 << 16


class ChannelClosedError(Exception):
    """The other side is gone."""


class Channel(Generic[Outgoing, Incoming]):
    """One end of the socket pair.

    Args:
        endpoint: A connected stream socket; blocking at the courier, made non-blocking at the trainer.
        incoming: The kinds of message that arrive at this end, by name.
    """

    def __init__(self, endpoint: socket.socket, incoming: Mapping[str, type[Incoming]]) -> None:
        self._socket = endpoint
        self._incoming = incoming
        self._received = bytearray()
        self._unsent = bytearray()

    def send(self, message: Outgoing) -> None:
        """Sends, waiting for room (courier only).

        Raises:
            ChannelClosedError: The other side is gone.
        """
        try:
            self._socket.sendall(_frame(message))
        except OSError as error:
            raise ChannelClosedError(str(error)) from error

    def post(self, message: Outgoing, *, may_be_lost: bool = False) -> bool:
        """Sends without ever waiting; what finds no room is kept and goes out with later calls.

        Args:
            message: What to say.
            may_be_lost: Drop it rather than keep it.

        Returns:
            False if the message was lost.

        Raises:
            ChannelClosedError: The other side is gone.
        """
        frame = _frame(message)
        if not self._flush() and (may_be_lost or len(self._unsent) + len(frame) > MAX_UNSENT_BYTES):
            return False
        self._unsent += frame
        self._flush()
        return True

    def _flush(self) -> bool:
        """Sends what is kept, as far as there is room; True once nothing is left."""
        while self._unsent:
            try:
                sent = self._socket.send(self._unsent)
            except BlockingIOError:
                return False
            except OSError as error:
                raise ChannelClosedError(str(error)) from error
            del self._unsent[:sent]
        return True

    def receive(self) -> Iterator[Incoming]:
        """Yields messages until the other side closes (blocking), or until none is left (non-blocking).

        Raises:
            ChannelClosedError: Non-blocking only: the other side is gone.
            MessageError: The other side sent what is not known here.
        """
        if not self._socket.getblocking():
            with contextlib.suppress(ChannelClosedError):
                # What it said before it went is still to be read.
                self._flush()
        while True:
            while self._has_message():
                yield self._next()
            try:
                data = self._socket.recv(_READ_BYTES)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                if self._socket.getblocking():
                    return
                raise ChannelClosedError("the courier closed its end")
            self._received += data

    def _has_message(self) -> bool:
        if len(self._received) < _LENGTH.size:
            return False
        (length,) = _LENGTH.unpack_from(self._received)
        return len(self._received) >= _LENGTH.size + length

    def _next(self) -> Incoming:
        (length,) = _LENGTH.unpack_from(self._received)
        end = _LENGTH.size + length
        body = self._received[_LENGTH.size : end]
        del self._received[:end]
        return decode(body, self._incoming)

    def set_blocking(self, blocking: bool) -> None:
        self._socket.setblocking(blocking)

    def wait_readable(self, timeout_s: float) -> None:
        """Returns once a message may be there, or after the timeout; goes on sending what was kept meanwhile.

        Raises:
            ChannelClosedError: The other side is gone.
        """
        deadline_s = time.monotonic() + timeout_s
        # Not select: it refuses descriptors of 1024 and above, which training processes reach.
        poller = select.poll()
        while not self._has_message() and (left_s := deadline_s - time.monotonic()) > 0:
            is_sent = self._flush()
            poller.register(self._socket, select.POLLIN if is_sent else select.POLLIN | select.POLLOUT)
            if any(events & ~select.POLLOUT for _, events in poller.poll(left_s * 1000)):
                return

    def finish(self, timeout_s: float) -> None:
        """Sends what was kept, waiting for room no longer than the timeout.

        Raises:
            ChannelClosedError: The other side is gone.
        """
        deadline_s = time.monotonic() + timeout_s
        poller = select.poll()
        poller.register(self._socket, select.POLLOUT)
        while not self._flush() and (left_s := deadline_s - time.monotonic()) > 0:
            poller.poll(left_s * 1000)

    def close(self) -> None:
        self._socket.close()


def _frame(message: ToCourier | ToHook) -> bytes:
    body = encode(message)
    return _LENGTH.pack(len(body)) + body
