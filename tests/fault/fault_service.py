"""A real nowcaster service in a process of its own, with points at which faults fire; everything but Ray is real."""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
from collections import defaultdict
from collections.abc import Awaitable, Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
from altered import CHUNK_ALTERATIONS, EVENT_ALTERATIONS, PREDICTION_ALTERATIONS, Messages
from faults import PERIOD_STEPS, Call, Fault, Phase
from service_harness import RunningService

from sidecast.nowcaster_service.nowcasting import (
    LocalRunner,
    NowcastAnswer,
    Nowcasting,
    NowcastRequest,
    PredictorAnswer,
    PredictorRequest,
)
from sidecast.nowcaster_service.vector_files import HistoryFiles
from sidecast.predictors.base import Predictor
from sidecast.protos import nowcast_pb2 as pb
from sidecast.protos.codec import decode_chunk


class FaultPoints:
    """Where this service is, and the fault that waits for it there.

    Args:
        link: To the conductor, who is told of every fault that fires.
        fault: Armed from the start.
    """

    def __init__(self, link: Connection, fault: Fault | None) -> None:
        self._link = link
        self._lock = threading.Lock()
        self._may_go_on = threading.Event()
        self.arm(fault)

    def arm(self, fault: Fault | None) -> None:
        """Makes the next call that fits run into the fault."""
        self._fault = fault
        self._num_left = 0 if fault is None else fault.times
        self._may_go_on.clear()

    def let_go(self) -> None:
        """Lets the call that is held go on."""
        self._may_go_on.set()

    def take(self, call: Call, phase: Phase, rank: int | None = None, step: int = 0) -> Fault | None:
        """The fault that is to fire here, if there is one; it counts as fired once ``fire`` is called."""
        fault = self._fault
        if fault is None or self._num_left == 0 or (fault.call, fault.phase) != (call, phase):
            return None
        if rank is not None and fault.rank not in (None, rank):
            return None
        if fault.is_at_base and step % PERIOD_STEPS != 0:
            return None
        return fault

    def fire(self) -> None:
        """Counts it."""
        with self._lock:
            self._num_left -= 1
        self._link.send("fired")

    async def reach(self, call: Call, phase: Phase, rank: int | None = None, step: int = 0) -> None:
        """Holds the call here, if a fault is to strike, until the conductor has struck."""
        if self.take(call, phase, rank, step) is not None:
            self.fire()
            await asyncio.to_thread(self._may_go_on.wait)

    def reach_in_thread(self, call: Call, phase: Phase) -> None:
        """The same off the event loop."""
        if self.take(call, phase) is not None:
            self.fire()
            self._may_go_on.wait()


class FaultInterceptor(grpc.aio.ServerInterceptor):
    """Stands between the wire and the servicer.

    Args:
        points: Where faults fire.
    """

    def __init__(self, points: FaultPoints) -> None:
        self._points = points
        self._committed: defaultdict[tuple[str, int], set[int]] = defaultdict(set)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler: Any = await continuation(handler_call_details)
        method: Any = handler_call_details.method.rpartition("/")[2]
        if method == "Upload":
            return grpc.stream_unary_rpc_method_handler(
                self._feeding(handler), response_serializer=handler.response_serializer
            )
        if method in ("Watch", "Fetch"):
            return grpc.unary_stream_rpc_method_handler(self._streaming(method, handler), handler.request_deserializer)
        if method in ("Open", "Commit"):
            return grpc.unary_unary_rpc_method_handler(
                self._answering(method, handler), handler.request_deserializer, handler.response_serializer
            )
        return handler

    def _answering(self, call: Call, handler: Any) -> Callable[..., Awaitable[Any]]:
        async def answer(request: Any, context: grpc.aio.ServicerContext) -> Any:
            rank, step = getattr(request, "rank", None), getattr(request, "step", 0)
            await self._points.reach(call, "before", rank, step)
            if call == "Commit":
                known = self._committed[request.session_id, step]
                if known - {rank}:
                    # Half of the ranks have committed.
                    await self._points.reach(call, "during", rank, step)
            reply = await handler.unary_unary(request, context)
            if call == "Commit":
                known.add(rank)
            await self._points.reach(call, "after", rank, step)
            return reply

        return answer

    def _feeding(self, handler: Any) -> Callable[..., Awaitable[Any]]:
        async def answer(requests: Messages, context: grpc.aio.ServicerContext) -> Any:
            rank: int | None = None

            async def frames() -> Any:
                nonlocal rank
                messages = aiter(requests)
                first = await anext(messages, None)
                if first is None:
                    return
                rank = decode_chunk(first).key.rank
                await self._points.reach("Upload", "before", rank)
                fault = self._points.take("Upload", "during", rank)
                altered = _chained(first, messages)
                if fault is not None and fault.what in CHUNK_ALTERATIONS:
                    altered = CHUNK_ALTERATIONS[fault.what](altered, self._points.fire)
                is_first = True
                async for message in altered:
                    if not is_first and (fault is None or fault.what not in CHUNK_ALTERATIONS):
                        await self._points.reach("Upload", "during", rank)
                    yield handler.request_deserializer(message)
                    is_first = False

            reply = await handler.stream_unary(frames(), context)
            await self._points.reach("Upload", "after", rank)
            return reply

        return answer

    def _streaming(self, call: Call, handler: Any) -> Callable[..., Any]:
        async def stream(request: Any, context: grpc.aio.ServicerContext) -> Any:
            await self._points.reach(call, "before", request.rank)
            fault = self._points.take(call, "during", request.rank)
            if fault is not None and fault.what == "refuse":
                self._points.fire()
                await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "refused by the test")
            messages = _serialized(handler, request, context)
            if fault is not None and fault.what in CHUNK_ALTERATIONS:
                messages = CHUNK_ALTERATIONS[fault.what](messages, self._points.fire)
                async for message in messages:
                    yield message
                return
            is_first = True
            async for message in messages:
                if call == "Fetch" and not is_first:
                    await self._points.reach(call, "during", request.rank)
                yield self._announced(message, request.rank) if call == "Watch" else message
                is_first = False
            await self._points.reach(call, "after", request.rank)

        return stream

    def _announced(self, message: bytes, rank: int) -> bytes:
        fault = self._points.take("Watch", "during", rank)
        event = pb.SessionEvent.FromString(message)
        if fault is None or event.WhichOneof("event") != "published":
            return message
        self._points.fire()
        EVENT_ALTERATIONS[fault.what](event)
        return event.SerializeToString()


async def _chained(first: bytes, rest: Messages) -> Messages:
    yield first
    async for message in rest:
        yield message


async def _serialized(handler: Any, request: Any, context: grpc.aio.ServicerContext) -> Messages:
    async for message in handler.unary_stream(request, context):
        yield handler.response_serializer(message)


class FaultRunner(LocalRunner):
    """Computes predictions, which faults alter or interrupt when they are half written.

    Args:
        points: Where faults fire.
    """

    def __init__(self, points: FaultPoints) -> None:
        self._points = points

    def predict(self, predictor: Predictor, files: HistoryFiles, horizon_intervals: int, delta_path: Path) -> None:
        super().predict(predictor, files, horizon_intervals, delta_path)
        fault = self._points.take("Predict", "during")
        if fault is None:
            return
        if fault.what in PREDICTION_ALTERATIONS:
            self._points.fire()
            PREDICTION_ALTERATIONS[fault.what](delta_path)
            return
        whole = delta_path.read_bytes()
        with delta_path.open("r+b") as file:
            file.seek(len(whole) // 2)
            file.write(bytes(len(whole) - len(whole) // 2))
        self._points.reach_in_thread("Predict", "during")


class FaultEngines:
    """Runs predictors in threads of this process.

    Args:
        points: Where faults fire.
        published: Folder for a copy of every prediction that was found good, named for its digest.
    """

    def __init__(self, points: FaultPoints, published: Path) -> None:
        self._points = points
        self._published = published
        self._nowcasting = Nowcasting(None, runner=FaultRunner(points))

    async def check(self, request: PredictorRequest) -> PredictorAnswer:
        await self._points.reach("Open", "during")
        return await asyncio.to_thread(self._nowcasting.check, request)

    async def predict(self, request: NowcastRequest) -> NowcastAnswer:
        await self._points.reach("Predict", "before")
        answer = await asyncio.to_thread(self._nowcasting.predict, request)
        if not answer.refusal:
            shutil.copyfile(request.delta_path, self._published / f"{answer.digest:016x}.f32")
        await self._points.reach("Predict", "after")
        return answer


def serve(link: Connection, folder: Path, port: int, fault: Fault | None) -> None:
    """Serves until the conductor goes away, or kills this process.

    Args:
        link: To the conductor.
        folder: For history, log and published predictions.
        port: 0 for a free one.
        fault: Armed from the start.
    """
    log = os.open(folder / "service.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    points = FaultPoints(link, fault)
    service = RunningService(
        folder,
        port,
        engines=FaultEngines(points, folder / "published"),
        interceptors=[FaultInterceptor(points)],
    )
    service.__enter__()
    link.send(service.port)
    try:
        while True:
            command = link.recv()
            if command == "go":
                points.let_go()
            else:
                points.arm(command)
    except EOFError:
        os._exit(0)
