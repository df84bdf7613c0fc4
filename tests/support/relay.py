"""A connection to a service that breaks when a test wants it to."""

from __future__ import annotations

import contextlib
import socket
import threading

from tests.support.limits import HANG_S


class Relay:
    """A TCP relay to a service that cuts both ways once so many bytes have gone up, and serves again after.

    Not before the service has taken something in: with the connection it would lose what it has not read.
    """

    def __init__(self, port: int, cut_after_bytes: int, has_arrived: threading.Event) -> None:
        self._target = port
        self._has_arrived = has_arrived
        self._lock = threading.Lock()
        self._left = cut_after_bytes
        self.num_cuts = 0
        self.bytes_up = 0
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
                self._pairs.append((near, far))
                threading.Thread(target=self._pump, args=(near, far, True), daemon=True).start()
                threading.Thread(target=self._pump, args=(far, near, False), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, is_up: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 14):
                target.sendall(data)
                if is_up:
                    self.bytes_up += len(data)
                    self._left -= len(data)
                    if self._left < 0 and self._has_arrived.wait(HANG_S):
                        self._cut_once()
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _cut_once(self) -> None:
        # Streams on several connections come here together.
        with self._lock:
            if self.num_cuts == 0:
                self.num_cuts += 1
                self.cut()

    def cut(self) -> None:
        for pair in self._pairs:
            for end in pair:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.close()
        self.cut()
