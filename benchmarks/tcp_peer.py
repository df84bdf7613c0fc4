"""What bench_transport measures against: plain sockets with the same checksums and the same copy at the end."""

from __future__ import annotations

import socket
import struct
from zlib import crc32

from sidecast.nowcaster_service.vector_store import FP32_BYTES, HistoryStore, VectorFile

UPLOAD, DOWNLOAD = b"u", b"d"
DONE = b"k"
SOCKET_BYTES = 4 << 20
# Of one chunk: offset, length, checksum.
HEADER = struct.Struct("<QII")


class TcpClient:
    """The rank's side.

    Args:
        port: Of a ``serve_tcp`` on this host.
        chunk_bytes: Size of the pieces that carry a checksum.
    """

    def __init__(self, port: int, chunk_bytes: int) -> None:
        self._socket = socket.socket()
        _enlarge(self._socket)
        self._socket.connect(("127.0.0.1", port))
        self._chunk_bytes = chunk_bytes

    def upload(self, buffer: memoryview) -> None:
        """Sends a buffer and waits until it has arrived."""
        self._socket.sendall(UPLOAD)
        _send(self._socket, buffer, self._chunk_bytes)
        if self._socket.recv(1) != DONE:
            raise ConnectionError("the peer ended")

    def download(self, buffer: memoryview) -> None:
        """Fills a buffer."""
        self._socket.sendall(DOWNLOAD)
        _receive(self._socket, buffer, memoryview(bytearray(self._chunk_bytes)))

    def close(self) -> None:
        self._socket.close()


def serve_tcp(listener: socket.socket, store: HistoryStore, num_bytes: int, chunk_bytes: int) -> None:
    """Serves one client until it goes; every upload fills another file of the store, as in the service."""
    _enlarge(listener)
    connection, _ = listener.accept()
    staging = memoryview(bytearray(chunk_bytes))
    newest: VectorFile | None = None
    while order := connection.recv(1):
        if order == DOWNLOAD:
            assert newest is not None, "an upload comes first"
            _send(connection, newest.view, chunk_bytes)
            continue
        vector = store.create(num_bytes // FP32_BYTES)
        _receive(connection, vector.view, staging)
        connection.sendall(DONE)
        if newest is not None:
            newest.delete()
        newest = vector


def _enlarge(endpoint: socket.socket) -> None:
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        endpoint.setsockopt(socket.SOL_SOCKET, option, SOCKET_BYTES)
    endpoint.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _send(connection: socket.socket, buffer: memoryview, chunk_bytes: int) -> None:
    for start in range(0, len(buffer), chunk_bytes):
        data = buffer[start : start + chunk_bytes]
        connection.sendall(HEADER.pack(start, len(data), crc32(data)))
        connection.sendall(data)


def _receive(connection: socket.socket, buffer: memoryview, staging: memoryview) -> None:
    header = memoryview(bytearray(HEADER.size))
    num_received = 0
    while num_received < len(buffer):
        _fill(connection, header)
        offset, length, checksum = HEADER.unpack(header)
        data = staging[:length]
        _fill(connection, data)
        if crc32(data) != checksum:
            raise ConnectionError(f"the chunk at byte {offset} is damaged")
        buffer[offset : offset + length] = data
        num_received += length


def _fill(connection: socket.socket, target: memoryview) -> None:
    position = 0
    while position < len(target):
        num_bytes = connection.recv_into(target[position:])
        if num_bytes == 0:
            raise ConnectionError("the peer ended")
        position += num_bytes
