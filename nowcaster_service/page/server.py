"""The page's port: HTTP within narrow limits, on an event loop in a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import ssl
import threading
import time
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import TypeVar

import h11

from sidecast.nowcaster_service.access.callers import Caller, Callers
from sidecast.nowcaster_service.access.encryption import watched_context
from sidecast.nowcaster_service.access.watched_file import WatchedFile
from sidecast.nowcaster_service.errors import AddressError
from sidecast.nowcaster_service.overview.fields import as_fields
from sidecast.nowcaster_service.page.answers import Answer, Answers, Request, refusal
from sidecast.nowcaster_service.servicer import Servicer
from sidecast.protos import nowcast_pb2 as pb

log = logging.getLogger(__name__)
T = TypeVar("T")

# Others wait in the system's queue, for no longer than it takes until some of these are over.
MAX_CONNECTIONS = 64
BACKLOG = 128
# From the handshake to the last byte, of one request; a connection has one.
CONNECTION_S = 10.0
HANDSHAKE_S = 5.0
SHUTDOWN_S = 1.0
VIEW_S = 5.0
MAX_REQUEST_BYTES = 16 << 10
# After an error of the system's, such as too many open files.
REST_S = 0.2


class PageServer:
    """A page that is served until it is closed.

    Args:
        servicer: What is shown, and who is asked to pause a run; lives on the loop that this is made on. Its settings
            name host and encryption.
        callers: Who may look.
        port: Where to listen; 0 picks a free port.

    Attributes:
        port: Where it listens.

    Raises:
        AddressError: The port is in use, or the address is not this host's.
        ConfigError: A file of certificates or keys cannot be used.
    """

    def __init__(self, servicer: Servicer, callers: Callers, port: int) -> None:
        config = servicer.config
        self._service_loop = asyncio.get_running_loop()
        self._servicer = servicer
        self._encryption = None if config.tls is None else watched_context(config.tls)
        self._answers = Answers(
            callers,
            self._seen_by,
            pause=self._paused_by if config.page_control else None,
            needs_token=config.token_file is not None or config.tenants_file is not None,
            host=config.host,
            clock=time.monotonic,
        )
        family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
        try:
            self._listener = socket.create_server((config.host, port), family=family, backlog=BACKLOG)
        except OSError as error:
            raise AddressError(
                f"cannot serve the page at {config.host}:{port}: {error.strerror} (--page-port)"
            ) from error
        self._listener.setblocking(False)
        self.port = int(self._listener.getsockname()[1])
        self._loop = asyncio.new_event_loop()
        self._serving = self._loop.create_task(accept_for_ever(self._listener, self._encryption, self._answers))
        self._thread = threading.Thread(target=self._run, name="page", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends it, with whoever is being answered."""
        with contextlib.suppress(RuntimeError):
            # Unless it has ended by itself.
            self._loop.call_soon_threadsafe(self._serving.cancel)
        self._thread.join()

    def _run(self) -> None:
        try:
            with contextlib.suppress(asyncio.CancelledError):
                self._loop.run_until_complete(self._serving)
        except Exception:
            # Nobody's training depends on it: the service goes on.
            log.exception("the page is not served any more")
        finally:
            self._listener.close()
            self._loop.close()

    async def _seen_by(self, caller: Caller) -> bytes:
        reply = await self._asked(lambda: self._servicer.overview.reply(caller))
        return json.dumps(as_fields(reply), separators=(",", ":")).encode()

    async def _paused_by(self, caller: Caller, run_id: str, is_paused: bool) -> None:
        request = pb.PauseRequest(run_id=run_id, is_paused=is_paused)
        await self._asked(lambda: self._servicer.pause(request, caller))

    async def _asked(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Has something done on the service's event loop.

        Raises:
            TimeoutError: It is busy.
        """

        async def work() -> T:
            return await ask()

        asked = asyncio.run_coroutine_threadsafe(work(), self._service_loop)
        return await asyncio.wait_for(asyncio.wrap_future(asked), VIEW_S)


async def accept_for_ever(
    listener: socket.socket, encryption: WatchedFile[ssl.SSLContext] | None, answers: Answers
) -> None:
    """Serves one connection after another, so many side by side.

    Args:
        listener: Not blocking.
        encryption: What handshakes are made with; None for none.
        answers: What to answer.
    """
    loop = asyncio.get_running_loop()
    free = asyncio.Semaphore(MAX_CONNECTIONS)

    async def serve(connection: socket.socket) -> None:
        try:
            async with asyncio.timeout(CONNECTION_S):
                await _serve(connection, None if encryption is None else encryption.value, answers)
        except (OSError, TimeoutError, h11.RemoteProtocolError, EOFError):
            # Whoever is at the other end, of his own accord or not.
            pass
        except Exception:
            log.exception("a request for the page failed")
        finally:
            connection.close()
            free.release()

    async with asyncio.TaskGroup() as serving:
        while True:
            await free.acquire()
            try:
                connection, _ = await loop.sock_accept(listener)
            except OSError as error:
                log.warning("the page's port cannot take a connection: %s", error)
                free.release()
                await asyncio.sleep(REST_S)
                continue
            serving.create_task(serve(connection))


async def _serve(connection: socket.socket, context: ssl.SSLContext | None, answers: Answers) -> None:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(MAX_REQUEST_BYTES)
    protocol = asyncio.StreamReaderProtocol(reader)
    transport, _ = await loop.connect_accepted_socket(
        lambda: protocol,
        connection,
        ssl=context,
        ssl_handshake_timeout=None if context is None else HANDSHAKE_S,
        ssl_shutdown_timeout=None if context is None else SHUTDOWN_S,
    )
    writer = asyncio.StreamWriter(transport, protocol, reader, loop)
    try:
        http = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_REQUEST_BYTES)
        is_head = False
        try:
            request = await _request(http, reader)
            is_head = request.method == "HEAD"
            answer = await answers.answer(request)
        except h11.RemoteProtocolError as error:
            answer = _malformed(error)
        writer.write(_bytes_of(http, answer, is_head=is_head))
        await writer.drain()
        writer.close()
        await writer.wait_closed()
    finally:
        # Nothing of it is left, however it ended.
        transport.abort()


async def _request(http: h11.Connection, reader: asyncio.StreamReader) -> Request:
    head: h11.Request | None = None
    body = b""
    while True:
        event = http.next_event()
        if event is h11.NEED_DATA:
            data = await reader.read(MAX_REQUEST_BYTES)
            if not data and http.their_state is h11.IDLE:
                raise EOFError
            http.receive_data(data)
        elif isinstance(event, h11.Request):
            head = event
        elif isinstance(event, h11.Data):
            body += event.data
        elif head is not None and isinstance(event, h11.EndOfMessage):
            return Request(
                method=head.method.decode(),
                target=head.target.decode("latin-1"),
                headers={name.decode("latin-1"): value.decode("latin-1") for name, value in head.headers},
                body=body,
            )
        else:
            raise EOFError
        if len(body) > MAX_REQUEST_BYTES:
            raise h11.RemoteProtocolError("too much is sent", HTTPStatus.REQUEST_ENTITY_TOO_LARGE)


def _malformed(error: h11.RemoteProtocolError) -> Answer:
    status = HTTPStatus(error.error_status_hint)
    return refusal(status, f"no request: {status.phrase}")


def _bytes_of(http: h11.Connection, answer: Answer, *, is_head: bool) -> bytes:
    # A connection has one request: what a client sends besides is of no use, and holds up nobody.
    headers = [*answer.headers.items(), ("Connection", "close")]
    events: list[h11.Event] = [
        h11.Response(status_code=answer.status, headers=headers, reason=answer.status.phrase.encode())
    ]
    if not is_head:
        events.append(h11.Data(data=answer.body))
    return b"".join(http.send(event) or b"" for event in [*events, h11.EndOfMessage()])
