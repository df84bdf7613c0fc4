"""Small messages between a training rank and its courier, over a socket pair.

The trainer's end never blocks: a courier that does not read (stopped, dying) costs messages, which are counted,
and never a step. Frames are a 4-byte length and a JSON object.
"""

from __future__ import annotations

import json
import select
import socket
import struct
from collections.abc import Iterator, Mapping
from typing import Any

_LENGTH = struct.Struct("<I")
_READ_BYTES = 1 << 16

Message = Mapping[str, Any]


class ChannelClosedError(Exception):
    """The other side is gone."""


class Channel:
    """One end of the socket pair.

    Args:
        endpoint: A connected stream socket; blocking at the courier, made non-blocking at the trainer.
    """

    def __init__(self, endpoint: socket.socket) -> None:
        self._socket = endpoint
        self._received = bytearray()
        self._unsent = bytearray()
        self.num_lost = 0

    def send(self, message: Message) -> None:
        """Sends, waiting for room (courier, and the trainer before its first step).

        Raises:
            ChannelClosedError: The other side is gone.
        """
        try:
            self._socket.sendall(_frame(message))
        except OSError as error:
            raise ChannelClosedError(str(error)) from error

    def post(self, message: Message) -> bool:
        """Sends without ever waiting; False if the message was lost, which is counted."""
        if self._flush():
            self._unsent += _frame(message)
            self._flush()
            return True
        self.num_lost += 1
        return False

    def _flush(self) -> bool:
        """Sends the rest of a frame that went out in part; True once nothing is left."""
        while self._unsent:
            try:
                sent = self._socket.send(self._unsent)
            except BlockingIOError:
                return False
            except OSError as error:
                raise ChannelClosedError(str(error)) from error
            del self._unsent[:sent]
        return True

    def receive(self) -> Iterator[Message]:
        """Yields messages until the other side closes (blocking), or until none is left (non-blocking).

        Raises:
            ChannelClosedError: Non-blocking only: the other side is gone.
        """
        while True:
            while (message := self._next()) is not None:
                yield message
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

    def _next(self) -> Message | None:
        if len(self._received) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._received)
        end = _LENGTH.size + length
        if len(self._received) < end:
            return None
        message = json.loads(self._received[_LENGTH.size : end])
        del self._received[:end]
        return message

    def set_blocking(self, blocking: bool) -> None:
        self._socket.setblocking(blocking)

    def wait_readable(self, timeout_s: float) -> None:
        """Returns once a message may be there, or after the timeout."""
        select.select([self._socket], [], [], timeout_s)

    def close(self) -> None:
        self._socket.close()


def _frame(message: Message) -> bytes:
    body = json.dumps(message, separators=(",", ":")).encode()
    return _LENGTH.pack(len(body)) + body
