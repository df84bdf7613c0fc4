"""The gRPC face of the service: method table, token, refusals as status codes, address. The home of grpc."""

from __future__ import annotations

import hmac
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any, NoReturn

import grpc
from google.protobuf.message import Message

from sidecast.errors import SidecastError
from sidecast.nowcaster_service.errors import AddressError, ServiceError, UnauthenticatedError
from sidecast.nowcaster_service.servicer import Servicer
from sidecast.protos import nowcast_pb2 as pb
from sidecast.protos.codec import ChunkFrame, CodecError, decode_chunk, encode_chunk
from sidecast.protos.refusals import REFUSAL_KEY, RefusalKind
from sidecast.protos.transport import AUTHORIZATION_KEY, BULK_OPTIONS, RUN_SECRET_KEY, SERVICE_NAME

log = logging.getLogger(__name__)

KEEPALIVE_MS = 60_000


def create_server(
    servicer: Servicer, port: int, interceptors: Sequence[grpc.aio.ServerInterceptor] = ()
) -> tuple[grpc.aio.Server, int]:
    """Binds a server on the running event loop; it is not started yet.

    Args:
        servicer: Answers the calls; its settings name host and encryption.
        port: Where to listen; 0 picks a free port.
        interceptors: Between the wire and the servicer.

    Returns:
        The server and its port.

    Raises:
        AddressError: The port is in use, or the address is not this host's.
    """
    config = servicer.config
    server = grpc.aio.server(
        interceptors=interceptors,
        options=[
            *BULK_OPTIONS,
            # Two services on one port would each see half of a session.
            ("grpc.so_reuseport", 0),
            # A host that vanished would by default look as if it watched its session for two hours more.
            ("grpc.keepalive_time_ms", KEEPALIVE_MS),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ],
    )
    server.add_generic_rpc_handlers((GrpcFace(servicer).handler(),))
    address = f"{config.host}:{port}"
    try:
        if config.tls is None:
            return server, server.add_insecure_port(address)
        pair = (config.tls.private_key.read_bytes(), config.tls.certificate.read_bytes())
        return server, server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
    except RuntimeError as error:
        raise AddressError(
            f"cannot listen at {address}: the port is in use, or the address is not this host's (--host, --port)"
        ) from error


class GrpcFace:
    """The servicer as gRPC calls it.

    Args:
        servicer: Answers the calls.
    """

    def __init__(self, servicer: Servicer) -> None:
        self._servicer = servicer

    def handler(self) -> grpc.GenericRpcHandler:
        """The method table; chunks bypass the protobuf runtime (see the codec)."""
        unary, feed, stream = (
            grpc.unary_unary_rpc_method_handler,
            grpc.stream_unary_rpc_method_handler,
            grpc.unary_stream_rpc_method_handler,
        )
        calls = self._servicer
        return grpc.method_handlers_generic_handler(
            SERVICE_NAME,
            {
                "Open": unary(self._answering(calls.open), pb.OpenRequest.FromString, _serialize),
                "Join": unary(self._answering(calls.join), pb.JoinRequest.FromString, _serialize),
                "Upload": feed(self._answering(calls.upload), _decode_or_none, _serialize),
                "Progress": unary(self._answering(calls.progress), pb.ProgressRequest.FromString, _serialize),
                "Commit": unary(self._answering(calls.commit), pb.CommitRequest.FromString, _serialize),
                "Watch": stream(self._streaming(calls.watch), pb.WatchRequest.FromString, _serialize),
                "Fetch": stream(self._streaming(calls.fetch), pb.FetchRequest.FromString, encode_chunk),
                "Report": unary(self._answering(calls.report), pb.ReportRequest.FromString, _serialize),
                "Status": unary(self._answering(calls.status), pb.StatusRequest.FromString, _serialize),
            },
        )

    async def _authorize(self, context: grpc.aio.ServicerContext) -> None:
        token = self._servicer.config.token
        if token is None:
            return
        # In constant time: the time of a plain comparison tells how much of a guess is right.
        if not hmac.compare_digest(_metadata(context, AUTHORIZATION_KEY).encode(), f"Bearer {token}".encode()):
            await self._refuse(context, UnauthenticatedError("the call carries no token, or a wrong one"))

    async def _refuse(self, context: grpc.aio.ServicerContext, error: Exception) -> NoReturn:
        kind, message = RefusalKind.FAILED, "the call failed; the service's log says how"
        if isinstance(error, SidecastError):
            # What the core refuses (a manifest, a horizon), the request was wrong in.
            kind = error.kind if isinstance(error, ServiceError) else RefusalKind.MALFORMED
            message = str(error)
        else:
            log.error("a call failed", exc_info=error)
        self._servicer.metrics.refused.labels(kind.status).inc()
        await context.abort(grpc.StatusCode[kind.status], message, ((REFUSAL_KEY, kind.name),))
        raise AssertionError("abort raises")

    def _answering(self, method: Callable[[Any, str], Awaitable[Message]]) -> Callable[..., Awaitable[Message]]:
        async def call(request: Any, context: grpc.aio.ServicerContext) -> Message:
            await self._authorize(context)
            try:
                return await method(request, _metadata(context, RUN_SECRET_KEY))
            except Exception as error:
                await self._refuse(context, error)

        return call

    def _streaming(self, method: Callable[[Any, str], AsyncGenerator[Any, None]]) -> Callable[..., AsyncIterator[Any]]:
        async def call(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
            await self._authorize(context)
            try:
                # Closed at once when the client goes away, so that a fetch does not pin its vector until collected.
                async with aclosing(method(request, _metadata(context, RUN_SECRET_KEY))) as messages:
                    async for message in messages:
                        yield message
            except Exception as error:
                await self._refuse(context, error)

        return call


def _metadata(context: grpc.aio.ServicerContext, key: str) -> str:
    value = dict(context.invocation_metadata() or ()).get(key, "")
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()


def _decode_or_none(message: bytes) -> ChunkFrame | None:
    # A deserialiser that raises ends the call without a word; None becomes a refusal with one.
    try:
        return decode_chunk(message)
    except CodecError:
        return None
