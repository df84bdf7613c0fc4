"""The gRPC face of the service: method table, token, refusals as status codes, address. The home of grpc."""

from __future__ import annotations

import logging
import traceback
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, NoReturn

import grpc
from google.protobuf.message import Message

from sidecast.errors import ConfigError, SidecastError
from sidecast.nowcaster_service.access.callers import Caller, Callers
from sidecast.nowcaster_service.access.health import HEALTH_CHECK, NOT_SERVING, SERVING, asks_for
from sidecast.nowcaster_service.access.rarely import Rarely
from sidecast.nowcaster_service.access.reading import MAX_MESSAGE_BYTES, reader_of
from sidecast.nowcaster_service.config import TlsFiles, host_and_port, read_file
from sidecast.nowcaster_service.errors import AddressError, MalformedError, ServiceError, UnauthenticatedError
from sidecast.nowcaster_service.servicer import Servicer
from sidecast.protos import nowcast_pb2 as pb
from sidecast.protos.codec import encode_chunk
from sidecast.protos.refusals import REFUSAL_KEY, RefusalKind
from sidecast.protos.transport import AUTHORIZATION_KEY, BULK_OPTIONS, RUN_SECRET_KEY, SERVICE_NAME

log = logging.getLogger(__name__)

KEEPALIVE_MS = 60_000
# Calls at once. A rank watches, and uploads or fetches over a few connections: thousands of ranks fit.
MAX_CALLS = 1 << 15
MAX_REFUSAL_CHARACTERS = 2_000
FAILURE_LOG_INTERVAL_S = 60.0
NO_TOKEN = "the call carries no token, or a wrong one"


def create_server(
    servicer: Servicer, callers: Callers, port: int, interceptors: Sequence[grpc.aio.ServerInterceptor] = ()
) -> tuple[grpc.aio.Server, int]:
    """Binds a server on the running event loop; it is not started yet.

    Args:
        servicer: Answers the calls; its settings name host and encryption.
        callers: Whose calls are answered.
        port: Where to listen; 0 picks a free port.
        interceptors: Between the wire and the servicer.

    Returns:
        The server and its port.

    Raises:
        AddressError: The port is in use, or the address is not this host's.
        ConfigError: A file of certificates or keys cannot be read.
    """
    config = servicer.config
    server = grpc.aio.server(
        interceptors=interceptors,
        maximum_concurrent_rpcs=MAX_CALLS,
        options=[
            *BULK_OPTIONS,
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            # Two services on one port would each see half of a session.
            ("grpc.so_reuseport", 0),
            # A host that vanished would by default look as if it watched its session for two hours more.
            ("grpc.keepalive_time_ms", KEEPALIVE_MS),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ],
    )
    server.add_generic_rpc_handlers((GrpcFace(servicer, callers),))
    address = host_and_port(config.host, port)
    try:
        if config.tls is None:
            return server, server.add_insecure_port(address)
        return server, server.add_secure_port(address, _credentials(config.tls))
    except RuntimeError as error:
        raise AddressError(
            f"cannot listen at {address}: the port is in use, or the address is not this host's (--host, --port)"
        ) from error


def _credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """A certificate that may be replaced: every handshake is made with what the files hold then."""

    def read() -> grpc.ServerCertificateConfiguration:
        authority = files.client_authority
        return grpc.ssl_server_certificate_configuration(
            [(read_file("--tls-key", files.private_key), read_file("--tls-cert", files.certificate))],
            None if authority is None else read_file("--tls-client-ca", authority),
        )

    latest = read()

    def read_again() -> grpc.ServerCertificateConfiguration:
        nonlocal latest
        try:
            latest = read()
        except ConfigError as error:
            log.warning("%s; what it held before holds", error)
        return latest

    return grpc.dynamic_ssl_server_credentials(latest, read_again, files.client_authority is not None)


class GrpcFace(grpc.GenericRpcHandler):
    """The servicer as gRPC calls it.

    Args:
        servicer: Answers the calls.
        callers: Whose calls are answered.
    """

    def __init__(self, servicer: Servicer, callers: Callers) -> None:
        self._servicer = servicer
        self._callers = callers
        self._failures = Rarely(FAILURE_LOG_INTERVAL_S)
        unary, feed, stream = (
            grpc.unary_unary_rpc_method_handler,
            grpc.stream_unary_rpc_method_handler,
            grpc.unary_stream_rpc_method_handler,
        )
        methods = {
            "Open": unary(self._answering(servicer.open), reader_of(pb.OpenRequest), _serialize),
            "Join": unary(self._answering(servicer.join), reader_of(pb.JoinRequest), _serialize),
            "Upload": feed(self._feeding(servicer.upload), reader_of(pb.Chunk), _serialize),
            "Progress": unary(self._answering(servicer.progress), reader_of(pb.ProgressRequest), _serialize),
            "Commit": unary(self._answering(servicer.commit), reader_of(pb.CommitRequest), _serialize),
            "Watch": stream(self._streaming(servicer.watch), reader_of(pb.WatchRequest), _serialize),
            "Fetch": stream(self._streaming(servicer.fetch), reader_of(pb.FetchRequest), encode_chunk),
            "Report": unary(self._answering(servicer.report), reader_of(pb.ReportRequest), _serialize),
            "Status": unary(self._answering(servicer.status), reader_of(pb.StatusRequest), _serialize),
            "ReadOut": stream(self._streaming(servicer.read_out), reader_of(pb.ReadOutRequest), _serialize),
            "Pause": unary(self._answering(servicer.pause), reader_of(pb.PauseRequest), _serialize),
        }
        self._methods = {f"/{SERVICE_NAME}/{name}": handler for name, handler in methods.items()}
        self._health = unary(self._check_health)
        # Reads nothing: whoever has no token has no say in how much is received, or parsed.
        self._refusing = grpc.stream_stream_rpc_method_handler(self._refuse_unauthenticated)

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        """Who answers a call; decided by its metadata alone, before any of its messages is read."""
        if handler_call_details.method == HEALTH_CHECK:
            return self._health
        method = self._methods.get(handler_call_details.method)
        return method if method is None or self._caller(handler_call_details) else self._refusing

    def _caller(self, call: Any) -> Caller | None:
        caller = self._callers.caller(_metadata(call, AUTHORIZATION_KEY))
        return caller and replace(caller, secret=_metadata(call, RUN_SECRET_KEY))

    def _require_caller(self, context: grpc.aio.ServicerContext) -> Caller:
        caller = self._caller(context)
        if caller is None:
            # The token was good when the call began.
            raise UnauthenticatedError(NO_TOKEN)
        return caller

    async def _check_health(self, request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        if not asks_for(request, SERVICE_NAME):
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no such service; there is {SERVICE_NAME}")
        return NOT_SERVING if self._servicer.engines_fault else SERVING

    async def _refuse_unauthenticated(self, _: Any, context: grpc.aio.ServicerContext) -> None:
        await self._refuse(context, UnauthenticatedError(NO_TOKEN))

    async def _refuse(self, context: grpc.aio.ServicerContext, error: Exception) -> NoReturn:
        kind, message = RefusalKind.FAILED, "the call failed; the service's log says how"
        if isinstance(error, SidecastError):
            # What the core refuses (a manifest, a horizon), the request was wrong in.
            kind = error.kind if isinstance(error, ServiceError) else RefusalKind.MALFORMED
            message = str(error)
            if len(message) > MAX_REFUSAL_CHARACTERS:
                # It travels where gRPC allows 8 KiB in all.
                message = f"{message[:MAX_REFUSAL_CHARACTERS]}..."
        else:
            self._log_failure(error)
        self._servicer.metrics.refused.labels(kind.status).inc()
        await context.abort(grpc.StatusCode[kind.status], message, ((REFUSAL_KEY, kind.name),))
        raise AssertionError("abort raises")

    def _log_failure(self, error: Exception) -> None:
        where = traceback.extract_tb(error.__traceback__)[-1]
        num_unsaid = self._failures.num_unsaid((type(error), where.filename, where.lineno))
        if num_unsaid is not None:
            log.error("a call failed, and %d like it since this was last said", num_unsaid, exc_info=error)

    def _answering(self, method: Callable[[Any, Caller], Awaitable[Message]]) -> Callable[..., Awaitable[Message]]:
        async def call(request: Any, context: grpc.aio.ServicerContext) -> Message:
            try:
                return await method(_read(request), self._require_caller(context))
            except Exception as error:
                await self._refuse(context, error)

        return call

    def _feeding(
        self, method: Callable[[AsyncIterator[Any], Caller], Awaitable[Message]]
    ) -> Callable[..., Awaitable[Message]]:
        async def call(requests: AsyncIterator[Any], context: grpc.aio.ServicerContext) -> Message:
            try:
                return await method((_read(request) async for request in requests), self._require_caller(context))
            except Exception as error:
                await self._refuse(context, error)

        return call

    def _streaming(
        self, method: Callable[[Any, Caller], AsyncGenerator[Any, None]]
    ) -> Callable[..., AsyncIterator[Any]]:
        async def call(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
            try:
                # Closed at once when the client goes away, so that a fetch does not pin its vector until collected.
                async with aclosing(method(_read(request), self._require_caller(context))) as messages:
                    async for message in messages:
                        yield message
            except Exception as error:
                await self._refuse(context, error)

        return call


def _read(request: Any) -> Any:
    """A message that was read within its limits; what was not is a refusal."""
    if isinstance(request, MalformedError):
        raise request
    return request


def _metadata(call: Any, key: str) -> str:
    metadata = call.invocation_metadata
    pairs = metadata() if callable(metadata) else metadata
    value = dict(pairs or ()).get(key, "")
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()
