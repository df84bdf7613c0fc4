"""What each call of nowcast.proto does; free of gRPC, whose home is server.py."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Any, Protocol
from zlib import crc32

from sidecast.nowcaster_service.access.callers import ANYBODY, Caller
from sidecast.nowcaster_service.access.owner import check_secret
from sidecast.nowcaster_service.admission import PredictorChecks, admit
from sidecast.nowcaster_service.config import MAX_CHUNK_BYTES, ServiceConfig
from sidecast.nowcaster_service.dispatch import Dispatcher, Predictions
from sidecast.nowcaster_service.errors import IncompatibleError, MalformedError, SaturatedError
from sidecast.nowcaster_service.handover import Handover
from sidecast.nowcaster_service.metrics import ServiceMetrics
from sidecast.nowcaster_service.overview.view import Overview
from sidecast.nowcaster_service.probing.source import ProbeSource, read_source
from sidecast.nowcaster_service.read_outs.messages import description
from sidecast.nowcaster_service.session_settings import SessionSettings
from sidecast.nowcaster_service.session_table import SessionTable
from sidecast.nowcaster_service.vector_store import HistoryStore
from sidecast.protos import nowcast_pb2 as pb
from sidecast.protos.codec import ChunkFrame
from sidecast.protos.shards import ShardSpec
from sidecast.protos.version import version_fault

log = logging.getLogger(__name__)

# A rank hands over its prediction buffer last.
PREDICTION_BUFFER = -1
_OUTCOMES = {
    pb.ReportRequest.APPLIED: "applied",
    pb.ReportRequest.ACCEPTED: "accepted",
    pb.ReportRequest.ROLLED_BACK: "rolled_back",
    pb.ReportRequest.REJECTED: "rejected",
}


class Engines(PredictorChecks, Predictions, Protocol):
    """Whoever knows predictors and runs them."""

    def fault(self) -> str:
        """Why no nowcast can be made now; empty if they can be."""
        ...


class Servicer:
    """The calls of one service process; lives on one event loop.

    Args:
        config: Settings.
        store: Where vectors live.
        engines: Who runs predictors.
        metrics: What Prometheus sees.
        version: Reported to clients.
        clock: Monotonic seconds.

    Attributes:
        sessions: All that are open.
        handover: Where couriers on this host leave their buffers, once it is started.
        overview: What all this looks like to who asks.
    """

    def __init__(
        self,
        config: ServiceConfig,
        store: HistoryStore,
        engines: Engines,
        metrics: ServiceMetrics,
        *,
        version: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self.metrics = metrics
        self.sessions = SessionTable(
            store,
            metrics,
            clock,
            config.session_timeout_s,
            max_sessions=config.max_sessions,
            run_budget_bytes=config.run_budget_bytes or store.budget_bytes,
            # An engine that takes longer is given up.
            lock_timeout_s=config.nowcast_timeout_s,
            may_pause_by_token=config.page_control,
        )
        self.handover = Handover(store.folder, self.sessions, clock=clock)
        self._store = store
        self._engines = engines
        self._probe = None if config.probe is None else read_source(config.probe, config.probe_tokenizer)
        self._dispatcher = Dispatcher(engines, config.nowcast_timeout_s, clock=clock)
        self.overview = Overview(config, store, self.sessions, engines, self._dispatcher, version=version, clock=clock)
        metrics.history_budget_bytes.set(store.budget_bytes)

    @property
    def engines_fault(self) -> str:
        """Why no nowcast can be made now; empty if they can be."""
        return self._engines.fault()

    # In the order of nowcast.proto. Each comes with who calls, and the secret of the run that it is about.

    async def open(self, request: pb.OpenRequest, caller: Caller = ANYBODY) -> pb.OpenReply:
        fault = version_fault("trainer", request.protocol_version)
        if fault:
            raise IncompatibleError(fault)
        check_secret(caller.secret, request.protocol_version)
        self.sessions.require_owner(request, caller)
        if self.sessions.find(request.session_id) is None:
            settings = await self._admitted(request)
            await self.sessions.kept.examine(request, caller.secret)
            # A client that gave up waiting and asked again may have been faster.
            if self.sessions.find(request.session_id) is None:
                pending = self.sessions.begin(settings, request, caller)
                if pending is not None:
                    self._dispatcher.start(*pending)
                self._dispatcher.fold(self.sessions.get(request.session_id))
        return pb.OpenReply(chunk_bytes=self.config.chunk_bytes, protocol_version=request.protocol_version)

    async def _admitted(self, request: pb.OpenRequest) -> SessionSettings:
        limit_s = self.config.nowcast_timeout_s
        if not request.HasField("push"):
            if self.engines_fault:
                raise SaturatedError(self.engines_fault)
            # Before the time begins: one that was replaced, or died, takes a while to be back.
            await self._engines.ready()
        try:
            return _with_probe(await asyncio.wait_for(admit(request, self._engines), limit_s), self._probe)
        except TimeoutError:
            # It would keep its thread, and at last there would be none for the checks of other runs.
            await self._engines.replace()
            raise SaturatedError(f"predictor {request.predictor} took longer than {limit_s:g} s to set up") from None

    async def join(self, request: pb.JoinRequest, caller: Caller = ANYBODY) -> pb.JoinReply:
        session = self.sessions.get_for(request.session_id, caller)
        session.join(request.rank, _shards(request.upload_shards), _shards(request.fetch_shards))
        self.metrics.ranks.labels(session.settings.run_id).set(session.num_joined)
        path, ticket = self.handover.issue(request.session_id, request.rank)
        return pb.JoinReply(
            chunk_bytes=self.config.chunk_bytes,
            local_socket=path,
            local_ticket=ticket,
            is_paused=session.is_paused,
        )

    async def upload(self, frames: AsyncIterator[ChunkFrame], caller: Caller = ANYBODY) -> pb.UploadReply:
        async for frame in frames:
            if frame.shared_bytes > MAX_CHUNK_BYTES:
                # Its checksum is computed on the event loop.
                raise MalformedError(
                    f"a chunk refers to {frame.shared_bytes} bytes of shared memory; allowed: {MAX_CHUNK_BYTES}"
                )
            session = self.sessions.get_for(frame.key.session_id, caller)
            while session.begins(frame.key) and await session.prepare():
                # Another rank's chunk may have begun it meanwhile.
                pass
            session.receive(frame)
            num_bytes = frame.shared_bytes or len(frame.data)
            self.metrics.received_bytes.labels(session.settings.run_id).inc(num_bytes)
            self.metrics.history_bytes.set(self._store.used_bytes)
        return pb.UploadReply()

    async def progress(self, request: pb.ProgressRequest, caller: Caller = ANYBODY) -> pb.ProgressReply:
        session = self.sessions.get_for(request.key.session_id, caller)
        ranges = session.progress(request.key)
        return pb.ProgressReply(received=[pb.ByteRange(start=start, stop=stop) for start, stop in ranges])

    async def commit(self, request: pb.CommitRequest, caller: Caller = ANYBODY) -> pb.CommitReply:
        session = self.sessions.get_for(request.session_id, caller)
        while session.needs_vector(request) and await session.prepare():
            pass
        task = session.commit(request)
        if task is not None:
            self._dispatcher.start(session, task)
        self._dispatcher.fold(session)
        return pb.CommitReply()

    async def watch(self, request: pb.WatchRequest, caller: Caller = ANYBODY) -> AsyncGenerator[pb.SessionEvent, None]:
        self.sessions.get_for(request.session_id, caller)
        async with aclosing(self.sessions.watch(request.session_id, request.rank)) as events:
            async for event in events:
                yield event

    async def fetch(self, request: pb.FetchRequest, caller: Caller = ANYBODY) -> AsyncGenerator[ChunkFrame, None]:
        session = self.sessions.get_for(request.session_id, caller)
        plan, prediction = session.fetch_plan(request.rank, request.version)
        task = prediction.task
        is_bf16 = request.dtype == pb.BF16
        if is_bf16 and not session.settings.rounds_to_bf16:
            raise MalformedError("a fetch asks for bf16; this run was opened with another wire_dtype")
        key = pb.ChunkKey(
            session_id=request.session_id,
            rank=request.rank,
            id=request.version,
            epoch=prediction.task.epoch,
            dtype=request.dtype,
        )
        sent = self.metrics.sent_bytes.labels(session.settings.run_id)
        with self.sessions.fetches.begin(request.session_id, prediction) as fetch:
            stop = request.offset_bytes + request.num_bytes
            if request.num_bytes == 0:
                stop = plan.travelling_bytes(request.dtype)
            for start in range(request.offset_bytes, stop, self.config.chunk_bytes):
                # The client may have let it wait for as long as it liked.
                fetch.require()
                length = min(self.config.chunk_bytes, stop - start)
                gather = plan.gather_halves if is_bf16 else plan.gather
                data = gather(task.delta.view, start, length)
                if request.into_shared:
                    session.shared(request.rank, PREDICTION_BUFFER, start, length)[:] = data
                    yield ChunkFrame(key, start, crc32(data), memoryview(b""), length)
                else:
                    yield ChunkFrame(key, start, crc32(data), data)
                sent.inc(length)

    async def report(self, request: pb.ReportRequest, caller: Caller = ANYBODY) -> pb.ReportReply:
        session = self.sessions.get_for(request.session_id, caller)
        outcome = _OUTCOMES.get(request.outcome)
        if outcome is None:
            raise MalformedError(f"outcome is {request.outcome}; allowed: {', '.join(_OUTCOMES.values())}")
        # All ranks do the same at the same step; rank 0 speaks for them in the counts.
        if request.rank == 0:
            setattr(session.counts, outcome, getattr(session.counts, outcome) + 1)
            self.metrics.jumps.labels(session.settings.run_id, outcome).inc()
            self.sessions.activity.settle(session.settings.run_id, request.version, outcome)
        session.settle(request.version)
        session.begin_epoch(request.epoch)
        return pb.ReportReply()

    async def status(self, request: pb.StatusRequest, caller: Caller = ANYBODY) -> pb.StatusReply:
        return await self.overview.reply(caller, with_sessions=not request.without_sessions)

    async def read_out(
        self, request: pb.ReadOutRequest, caller: Caller = ANYBODY
    ) -> AsyncGenerator[pb.ReadOutPart, None]:
        session = self.sessions.of_run(request.run_id, caller)
        average, settings = session.read_outs.get(request.name), session.settings
        sent = self.metrics.sent_bytes.labels(settings.run_id)
        with self.sessions.exports.begin_alone(settings.session_id, average.step, average.vector) as fetch:
            yield pb.ReadOutPart(description=description(request.name, average, session))
            for start in range(0, settings.num_vector_bytes, self.config.chunk_bytes):
                fetch.require()
                data = bytes(average.vector.view[start : start + self.config.chunk_bytes])
                yield pb.ReadOutPart(offset_bytes=start, crc32=crc32(data), data=data)
                sent.inc(len(data))

    async def pause(self, request: pb.PauseRequest, caller: Caller = ANYBODY) -> pb.PauseReply:
        return pb.PauseReply(has_changed=self.sessions.pause(request.run_id, request.is_paused, caller))


def _with_probe(settings: SessionSettings, probe: ProbeSource | None) -> SessionSettings:
    """The same settings of a run whose read-outs are evaluated, if it has any and the probe suits its model."""
    if probe is None and settings.keep_best:
        raise MalformedError(
            f"keep_best is {settings.keep_best}; allowed: 0, since the service has no probe (sidecast serve --probe)"
        )
    if probe is None or not settings.read_outs:
        return settings
    fault = probe.fault(settings.manifest.config)
    if fault and settings.keep_best:
        raise MalformedError(f"keep_best is {settings.keep_best}; allowed: 0, since {fault}")
    if fault:
        log.warning("run %s is not evaluated: %s", settings.run_id, fault)
    return replace(settings, probe="" if fault else probe.name, probe_fault=fault)


def _shards(messages: Any) -> tuple[ShardSpec, ...]:
    return tuple(ShardSpec(item.parameter, item.start, item.stop) for item in messages)
