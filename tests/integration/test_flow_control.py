"""How far a courier gets ahead of a service that takes nothing: HTTP/2's own flow control is all that there is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from sidecast.protos import nowcast_pb2 as pb
from sidecast.protos.codec import ChunkFrame
from sidecast.trainer.courier.client import NowcastClient
from sidecast.trainer.courier.refusals import UnavailableError
from sidecast.trainer.courier.upload import Upload
from sidecast.trainer.pipe.messages import ClientSettings
from tests.support.services.harness import RunningService

CHUNK_BYTES = 1 << 20
NUM_CHUNKS = 64
# What each connection may hold: BULK_OPTIONS' look-ahead of 8 MiB, and the chunk that waits for room in it.
MAX_AHEAD = 9


class Stall(grpc.aio.ServerInterceptor):
    """Takes nothing of any upload, for as long as the call lasts."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler: Any = await continuation(handler_call_details)
        if not handler_call_details.method.endswith("/Upload"):
            return handler

        async def stall(frames: AsyncIterator[ChunkFrame], context: Any) -> None:
            await asyncio.Event().wait()

        return grpc.stream_unary_rpc_method_handler(stall, handler.request_deserializer, handler.response_serializer)


@pytest.mark.parametrize("channels", [1, 2])
def test_a_service_that_takes_nothing_soon_stops_the_courier(tmp_path: Path, channels: int) -> None:
    chunk = memoryview(bytes(CHUNK_BYTES))
    cut: list[int] = []

    def read(start: int, length: int) -> memoryview:
        cut.append(start)
        return chunk[:length]

    with RunningService(tmp_path, interceptors=[Stall()]) as service:
        client = NowcastClient(
            ClientSettings(
                endpoint=service.endpoint,
                token_file=None,
                tls_ca=None,
                connect_s=1.0,
                chunk_s=2.0,
                # Time enough for all chunks, if nothing held them up.
                stream_s=3.0,
                channels=channels,
            )
        )
        upload = Upload(pb.ChunkKey(session_id="s1", id=10), NUM_CHUNKS * CHUNK_BYTES, read)
        upload.fill(CHUNK_BYTES)
        with pytest.raises(UnavailableError, match="DEADLINE_EXCEEDED"):
            client.upload(upload)
        client.close()
    assert 1 <= len(cut) <= channels * MAX_AHEAD
