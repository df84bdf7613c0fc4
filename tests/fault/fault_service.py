"""A real nowcaster service in a process of its own, with points at which faults fire; everything but Ray is real."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import threading
from collections import defaultdict
from collections.abc import Awaitable, Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
from altered import CHUNK_ALTERATIONS, EVENT_ALTERATIONS, PREDICTION_ALTERATIONS, Messages
from faults import PERIOD_STEPS, Call, Fault, Phase, Way

from sidecast.nowcaster_service.handover import Handover, HandoverError
from sidecast.nowcaster_service.nowcasting import (
    LocalRunner,
    NowcastAnswer,
    Nowcasting,
    NowcastRequest,
    PredictorAnswer,
    PredictorRequest,
)
from sidecast.nowcaster_service.servicer import PREDICTION_BUFFER
from sidecast.nowcaster_service.vector_files import HistoryFiles
from sidecast.predictors.base import Predictor
from sidecast.protos import nowcast_pb2 as pb
from sidecast.protos.codec import ChunkFrame, decode_chunk
from tests.support.services.harness import RunningService, SteadyEngines

# What happens to an upload or a fetch as it passes, once for each; all else strikes at some point of it.
ALTERATIONS = {*CHUNK_ALTERATIONS, "change the memory", "lose the memory"}


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
        self._is_announced = False
        self._num_unsaid = 0
        self.arm(fault)

    def announce(self, port: int) -> None:
        """Tells the conductor where this service is, before anything else: ranks that look for it may call at once."""
        with self._lock:
            self._link.send(port)
            for _ in range(self._num_unsaid):
                self._link.send("fired")
            self._is_announced = True

    def arm(self, fault: Fault | None) -> None:
        """Makes the next call that fits run into the fault."""
        self._fault = fault
        self._num_left = 0 if fault is None else fault.times
        self._may_go_on.clear()

    def let_go(self) -> None:
        """Lets the call that is held go on."""
        self._may_go_on.set()

    def take(
        self, call: Call, phase: Phase, rank: int | None = None, step: int = 0, way: Way | None = None
    ) -> Fault | None:
        """The fault that is to fire here, if there is one; it counts as fired once ``fire`` is called."""
        fault = self._fault
        if fault is None or self._num_left == 0 or (fault.call, fault.phase) != (call, phase):
            return None
        if rank is not None and fault.rank not in (None, rank):
            return None
        if fault.way not in (None, way):
            return None
        if fault.is_at_base and step % PERIOD_STEPS != 0:
            return None
        return fault

    def fire(self) -> None:
        """Counts it."""
        with self._lock:
            self._num_left -= 1
            if self._is_announced:
                self._link.send("fired")
            else:
                self._num_unsaid += 1

    async def reach(
        self, call: Call, phase: Phase, rank: int | None = None, step: int = 0, way: Way | None = None
    ) -> None:
        """Holds the call here, if a fault is to strike, until the conductor has struck."""
        if self.take(call, phase, rank, step, way) is not None:
            self.fire()
            await asyncio.to_thread(self._may_go_on.wait)

    def reach_in_thread(self, call: Call, phase: Phase) -> None:
        """The same off the event loop."""
        if self.take(call, phase) is not None:
            self.fire()
            self._may_go_on.wait()


class SharedMemory:
    """What this service has mapped of its ranks' memory, to be spoilt.

    Attributes:
        service: Known once it runs.
    """

    service: RunningService

    def flip_a_bit(self, frame: ChunkFrame, buffer: int) -> None:
        """Flips one within what a chunk refers to, in an exponent: it would be seen in what is predicted."""
        session = self.service.servicer.sessions.get(frame.key.session_id)
        session.shared(frame.key.rank, buffer, frame.offset_bytes, frame.shared_bytes)[3] ^= 0x40

    def lose(self, session_id: str, rank: int) -> None:
        """Forgets a rank's memory."""
        self.service.servicer.sessions.get(session_id)._ranks._shared.pop(rank)


class FaultInterceptor(grpc.aio.ServerInterceptor):
    """Stands between the wire and the servicer.

    Args:
        points: Where faults fire.
        memory: What faults do to memory that is shared.
    """

    def __init__(self, points: FaultPoints, memory: SharedMemory) -> None:
        self._points = points
        self._memory = memory
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
            way: Way | None = None
            flipped: ChunkFrame | None = None

            async def frames() -> Any:
                nonlocal rank, way, flipped
                messages = aiter(requests)
                first = await anext(messages, None)
                if first is None:
                    return
                frame = decode_chunk(first)
                rank, way = frame.key.rank, _way(frame)
                await self._points.reach("Upload", "before", rank, way=way)
                fault = self._points.take("Upload", "during", rank, way=way)
                altered = _chained(first, messages)
                if fault is not None and fault.what == "change the memory":
                    self._points.fire()
                    self._memory.flip_a_bit(frame, frame.shared_buffer)
                    flipped = frame
                if fault is not None and fault.what == "lose the memory":
                    self._points.fire()
                    self._memory.lose(frame.key.session_id, rank)
                if fault is not None and fault.what in CHUNK_ALTERATIONS:
                    altered = CHUNK_ALTERATIONS[fault.what](altered, self._points.fire)
                is_first = True
                async for message in altered:
                    if not is_first and (fault is None or fault.what not in ALTERATIONS):
                        await self._points.reach("Upload", "during", rank, way=way)
                    yield handler.request_deserializer(message)
                    is_first = False

            try:
                reply = await handler.stream_unary(frames(), context)
            finally:
                if flipped is not None:
                    # It was changed after its checksum was taken, not before: the next attempt reads it as it was.
                    self._memory.flip_a_bit(flipped, flipped.shared_buffer)
            await self._points.reach("Upload", "after", rank, way=way)
            return reply

        return answer

    def _streaming(self, call: Call, handler: Any) -> Callable[..., Any]:
        async def stream(request: Any, context: grpc.aio.ServicerContext) -> Any:
            way = _way_of_fetch(request) if call == "Fetch" else None
            await self._points.reach(call, "before", request.rank, way=way)
            fault = self._points.take(call, "during", request.rank, way=way)
            if fault is not None and fault.what == "lose the memory":
                self._points.fire()
                self._memory.lose(request.session_id, request.rank)
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
                if fault is not None and fault.what == "change the memory" and is_first:
                    self._points.fire()
                    self._memory.flip_a_bit(decode_chunk(message), PREDICTION_BUFFER)
                elif call == "Fetch" and not is_first and (fault is None or fault.what not in ALTERATIONS):
                    await self._points.reach(call, "during", request.rank, way=way)
                yield self._announced(message, request.rank) if call == "Watch" else message
                is_first = False
            await self._points.reach(call, "after", request.rank, way=way)

        return stream

    def _announced(self, message: bytes, rank: int) -> bytes:
        fault = self._points.take("Watch", "during", rank)
        event = pb.SessionEvent.FromString(message)
        if fault is None or event.WhichOneof("event") != "published":
            return message
        self._points.fire()
        EVENT_ALTERATIONS[fault.what](event)
        return event.SerializeToString()


def _way(frame: ChunkFrame) -> Way:
    if frame.shared_bytes:
        return "shared"
    return "bf16" if frame.key.dtype == pb.BF16 else "fp32"


def _way_of_fetch(request: pb.FetchRequest) -> Way:
    if request.into_shared:
        return "shared"
    return "bf16" if request.dtype == pb.BF16 else "fp32"


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


class FaultEngines(SteadyEngines):
    """Runs predictors in threads of this process.

    Args:
        points: Where faults fire.
        published: Folder for a copy of every prediction that was found good, and of its window, named for its digest.
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
            states = b"".join(path.read_bytes() for path in request.state_paths)
            (self._published / f"{answer.digest:016x}-states.f32").write_bytes(states)
        await self._points.reach("Predict", "after")
        return answer


class FaultHandover:
    """Refuses to take ranks' memory, always or as a fault.

    Args:
        handover: Of the service.
        points: Where faults fire.
        takes: False: never takes any.
    """

    def __init__(self, handover: Handover, points: FaultPoints, *, takes: bool) -> None:
        self._take_really = handover._take
        self._points = points
        self._takes = takes
        handover._take = self._take  # type: ignore[method-assign]

    async def _take(self, connection: socket.socket) -> None:
        if self._points.take("Share", "before") is not None:
            self._points.fire()
            raise HandoverError("refused by the test")
        if not self._takes:
            raise HandoverError("none is taken here")
        await self._take_really(connection)


def serve(link: Connection, folder: Path, port: int, fault: Fault | None, shares: bool) -> None:
    """Serves until the conductor goes away, or kills this process.

    Args:
        link: To the conductor.
        folder: For history, log and published predictions.
        port: 0 for a free one.
        fault: Armed from the start.
        shares: Takes ranks' memory, if they offer it.
    """
    log = os.open(folder / "service.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    points = FaultPoints(link, fault)
    memory = SharedMemory()
    service = memory.service = RunningService(
        folder,
        port,
        engines=FaultEngines(points, folder / "published"),
        interceptors=[FaultInterceptor(points, memory)],
        before_start=lambda servicer: FaultHandover(servicer.handover, points, takes=shares),
    )
    service.__enter__()
    points.announce(service.port)
    try:
        while True:
            command = link.recv()
            if command == "go":
                points.let_go()
            else:
                points.arm(command)
    except EOFError:
        os._exit(0)
