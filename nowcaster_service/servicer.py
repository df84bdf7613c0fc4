"""The gRPC face of the service: maps messages to sessions and refusals to status codes. The home of grpc."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import math
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from typing import Any, NoReturn, Protocol

import grpc
from google.protobuf.message import Message

from sidecast.errors import SidecastError
from sidecast.horizon import resolve_horizons
from sidecast.manifest import ModelManifest
from sidecast.nowcaster_service.config import ServiceConfig
from sidecast.nowcaster_service.errors import (
    CorruptChunkError,
    MalformedError,
    SaturatedError,
    UnknownSessionError,
    WrongStateError,
)
from sidecast.nowcaster_service.history import HistoryStore
from sidecast.nowcaster_service.metrics import ServiceMetrics
from sidecast.nowcaster_service.nowcasting import NowcastAnswer, NowcastRequest, PredictorAnswer, PredictorRequest
from sidecast.nowcaster_service.sessions import (
    FailureEvent,
    NowcastTask,
    Prediction,
    Session,
    SessionSettings,
    SnapshotEvent,
)
from sidecast.protos import nowcast_pb2 as pb
from sidecast.protos.codec import ChunkFrame, CodecError, decode_chunk, encode_chunk, split_chunks
from sidecast.protos.shards import ShardSpec

log = logging.getLogger(__name__)

_STATUS: dict[type[SidecastError], grpc.StatusCode] = {
    MalformedError: grpc.StatusCode.INVALID_ARGUMENT,
    WrongStateError: grpc.StatusCode.FAILED_PRECONDITION,
    UnknownSessionError: grpc.StatusCode.NOT_FOUND,
    SaturatedError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    CorruptChunkError: grpc.StatusCode.DATA_LOSS,
    SidecastError: grpc.StatusCode.INVALID_ARGUMENT,
}
SERVICE_NAME = "sidecast.v1.Nowcaster"
AUTHORIZATION = "authorization"
# Ended sessions of resumed runs whose couriers may still come back for them.
MAX_SUPERSEDED = 1024
MAX_NOWCASTS = 1_000_000
# A session that no courier has watched for so long is a dead job's, and gives way to one that needs its space.
ORPHAN_GRACE_S = 30.0


_OUTCOMES = {
    pb.ReportRequest.APPLIED: "applied",
    pb.ReportRequest.ACCEPTED: "accepted",
    pb.ReportRequest.ROLLED_BACK: "rolled_back",
    pb.ReportRequest.REJECTED: "rejected",
}


class Engines(Protocol):
    """Whoever runs predictors: an actor pool in the service, the test's own process in tests."""

    async def check(self, request: PredictorRequest) -> PredictorAnswer: ...

    async def predict(self, request: NowcastRequest) -> NowcastAnswer: ...


class Servicer:
    """All sessions of one service process; lives on one event loop, so sessions need no locks.

    Args:
        config: Settings.
        store: Where vectors live.
        engines: Who runs predictors.
        metrics: What Prometheus sees.
        version: Reported to clients.
        clock: Monotonic seconds.
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
        self._config = config
        self._store = store
        self._engines = engines
        self._metrics = metrics
        self._version = version
        self._clock = clock
        self._started_s = clock()
        self._sessions: dict[str, Session] = {}
        self._last_seen_s: dict[str, float] = {}
        self._watchers: dict[str, list[asyncio.Queue[pb.SessionEvent | None]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._superseded: deque[str] = deque(maxlen=MAX_SUPERSEDED)
        metrics.history_budget_bytes.set(store.budget_bytes)

    # --- calls, in the order of nowcast.proto

    async def open(self, request: pb.OpenRequest) -> pb.OpenReply:
        known = self._sessions.get(request.session_id)
        if known is None:
            if request.session_id in self._superseded:
                raise WrongStateError(f"session {request.session_id} was superseded by a later one of its run")
            settings = await self._settings(request)
            # A client that gave up waiting and asked again may have been faster.
            if request.session_id not in self._sessions:
                self._begin(settings, request)
        elif known.settings.manifest.schema_hash != request.schema_hash:
            raise MalformedError(f"session {request.session_id} is already open for another model")
        self._last_seen_s[request.session_id] = self._clock()
        return pb.OpenReply(chunk_bytes=self._config.chunk_bytes, service_version=self._version)

    async def join(self, request: pb.JoinRequest) -> pb.JoinReply:
        session = self._session(request.session_id)
        session.join(request.rank, _shards(request.upload_shards), _shards(request.fetch_shards))
        self._metrics.ranks.labels(session.settings.run_id).set(session.num_joined)
        return pb.JoinReply(chunk_bytes=self._config.chunk_bytes)

    async def upload(self, frames: AsyncIterator[ChunkFrame | None]) -> pb.UploadReply:
        received_bytes = 0
        async for frame in frames:
            if frame is None:
                raise MalformedError("an upload holds a message that is not a Chunk")
            session = self._session(frame.key.session_id)
            session.receive(frame)
            received_bytes += len(frame.data)
            self._metrics.received_bytes.labels(session.settings.run_id).inc(len(frame.data))
            self._metrics.history_bytes.set(self._store.used_bytes)
        return pb.UploadReply(received_bytes=received_bytes)

    async def commit(self, request: pb.CommitRequest) -> pb.CommitReply:
        session = self._session(request.session_id)
        num_committed = session.counts.committed
        task = session.commit(request.rank, request.step, request.epoch, request.num_bytes, request.digest)
        if task is not None:
            self._spawn(self._nowcast(session, task))
        return pb.CommitReply(snapshot_committed=session.counts.committed > num_committed)

    async def watch(self, request: pb.WatchRequest) -> AsyncGenerator[pb.SessionEvent, None]:
        session = self._session(request.session_id)
        queue: asyncio.Queue[pb.SessionEvent | None] = asyncio.Queue()
        queues = self._watchers.setdefault(request.session_id, [])
        queues.append(queue)
        try:
            if session.prediction is not None:
                yield _event(session.prediction, session)
            while (event := await queue.get()) is not None:
                yield event
        finally:
            queues.remove(queue)

    async def fetch(self, request: pb.FetchRequest) -> AsyncGenerator[ChunkFrame, None]:
        session = self._session(request.session_id)
        plan, prediction = session.fetch_plan(request.rank, request.version)
        task = prediction.task
        key = pb.ChunkKey(
            session_id=request.session_id, rank=request.rank, id=request.version, epoch=prediction.task.epoch
        )
        sent = self._metrics.sent_bytes.labels(session.settings.run_id)
        task.delta.pin()
        try:
            for start in range(request.offset_bytes, plan.num_bytes, self._config.chunk_bytes):
                length = min(self._config.chunk_bytes, plan.num_bytes - start)
                data = plan.gather(task.delta.view, start, length)
                frame = next(split_chunks(key, data, length))
                yield ChunkFrame(key, start, frame.crc32, data)
                sent.inc(length)
        finally:
            task.delta.unpin()

    async def report(self, request: pb.ReportRequest) -> pb.ReportReply:
        session = self._session(request.session_id)
        outcome = _OUTCOMES.get(request.outcome)
        if outcome is None:
            raise MalformedError(f"outcome is {request.outcome}; allowed: {', '.join(_OUTCOMES.values())}")
        # All ranks do the same at the same step; rank 0 speaks for them in the counts.
        if request.rank == 0:
            setattr(session.counts, outcome, getattr(session.counts, outcome) + 1)
            self._metrics.jumps.labels(session.settings.run_id, outcome).inc()
        session.begin_epoch(request.epoch)
        return pb.ReportReply()

    async def status(self, request: pb.StatusRequest) -> pb.StatusReply:
        now_s = self._clock()
        return pb.StatusReply(
            service_version=self._version,
            uptime_seconds=now_s - self._started_s,
            history_bytes=self._store.used_bytes,
            history_budget_bytes=self._store.budget_bytes,
            sessions=[
                pb.SessionStatus(
                    session_id=session_id,
                    run_id=session.settings.run_id,
                    predictor=session.settings.predictor,
                    world_size=session.settings.world_size,
                    num_joined=session.num_joined,
                    num_parameters=session.settings.manifest.num_elements,
                    epoch=session.epoch,
                    history_steps=session.history_steps,
                    context_len=session.settings.context_len,
                    num_committed=session.counts.committed,
                    num_aborted=session.counts.aborted,
                    num_published=session.counts.published,
                    num_failed=session.counts.failed,
                    num_applied=session.counts.applied,
                    num_rolled_back=session.counts.rolled_back,
                    idle_seconds=now_s - self._last_seen_s[session_id],
                )
                for session_id, session in self._sessions.items()
            ],
        )

    # --- sessions

    def _session(self, session_id: str) -> Session:
        session = self._sessions.get(session_id)
        if session is None:
            raise UnknownSessionError(f"session {session_id!r} is not known here; open it first")
        self._last_seen_s[session_id] = self._clock()
        return session

    async def _settings(self, request: pb.OpenRequest) -> SessionSettings:
        manifest = ModelManifest.from_shapes(
            ((item.fqn, item.shape) for item in request.manifest.parameters),
            _json_object("manifest.config_json", request.manifest.config_json),
            dict(request.manifest.aliases),
        )
        if manifest.schema_hash != request.schema_hash:
            raise MalformedError(f"schema hash is {request.schema_hash!r}; this manifest's is {manifest.schema_hash!r}")
        for name, value in (
            ("session_id", request.session_id),
            ("run_id", request.run_id),
            ("world_size", request.world_size),
            ("snapshot_interval_steps", request.snapshot_interval_steps),
            ("period_steps", request.period_steps),
            ("manifest.parameters", manifest.num_elements),
        ):
            if not value:
                raise MalformedError(f"{name} is {value!r}; it must not be empty or zero")
        if request.context_len < 2:
            raise MalformedError(f"context_len is {request.context_len}; allowed: 2 or more")
        if request.period_steps % request.snapshot_interval_steps != 0:
            raise MalformedError(
                f"period_steps is {request.period_steps}; allowed: multiples of snapshot_interval_steps "
                f"({request.snapshot_interval_steps})"
            )
        if request.max_steps // request.period_steps > MAX_NOWCASTS:
            raise MalformedError(
                f"max_steps is {request.max_steps}; allowed: {MAX_NOWCASTS} periods of {request.period_steps} steps"
            )
        options = _json_object("predictor_options_json", request.predictor_options_json)
        answer = await self._engines.check(
            PredictorRequest(
                predictor=request.predictor,
                options=options,
                manifest_json=manifest.to_json(),
                context_len=request.context_len,
                max_horizon=request.horizon.max_intervals,
            )
        )
        if answer.refusal:
            raise MalformedError(answer.refusal)
        return SessionSettings(
            session_id=request.session_id,
            run_id=request.run_id,
            world_size=request.world_size,
            manifest=manifest,
            context_len=request.context_len,
            snapshot_interval_steps=request.snapshot_interval_steps,
            period_steps=request.period_steps,
            horizons=resolve_horizons(
                request.horizon.schedule,
                request.horizon.max_intervals,
                request.horizon.power or 2.0,
                request.max_steps,
                request.period_steps,
                answer.max_horizon,
            ),
            predictor=request.predictor,
            predictor_options=options,
            max_relative_norm=request.max_relative_norm or math.inf,
        )

    def _begin(self, settings: SessionSettings, request: pb.OpenRequest) -> None:
        self.expire_sessions()
        self._make_room(settings)
        earlier = [session for session in self._sessions.values() if session.settings.run_id == settings.run_id]
        session_id = settings.session_id
        session = Session(settings, self._store, lambda event: self._on_event(session_id, event))
        for superseded in earlier:
            if request.resumed:
                session.adopt(superseded, request.resume_step, request.resume_epoch)
            self._end(superseded.settings.session_id)
            self._superseded.append(superseded.settings.session_id)
        self._sessions[session_id] = session
        self._last_seen_s[session_id] = self._clock()
        self._metrics.sessions.set(len(self._sessions))
        self._metrics.begin_run(settings.run_id)
        log.info(
            "session %s of run %s: %d ranks, %d parameters, predictor %s, horizons %s",
            session_id,
            settings.run_id,
            settings.world_size,
            settings.manifest.num_elements,
            settings.predictor,
            settings.horizons[:12],
        )

    def _make_room(self, settings: SessionSettings) -> None:
        """Ends sessions that nobody watches any more, the longest idle first, until this one fits."""
        needs = (
            f"a session of {settings.manifest.num_elements} parameters needs {settings.needed_bytes} bytes of history "
            f"({settings.context_len} states and working copies, 4 bytes each)"
        )
        budget_bytes = self._store.budget_bytes
        if settings.needed_bytes > budget_bytes:
            raise MalformedError(f"{needs}; the service has {budget_bytes} (sidecast serve --history-gib)")
        others = {
            session_id: session.settings
            for session_id, session in self._sessions.items()
            if session.settings.run_id != settings.run_id
        }
        promised = sum(other.needed_bytes for other in others.values())
        for session_id in sorted(others, key=self._last_seen_s.__getitem__):
            is_orphan = not self._watchers.get(session_id) and self._idle_s(session_id) > ORPHAN_GRACE_S
            if promised + settings.needed_bytes > budget_bytes and is_orphan:
                log.info("session %s, which nobody watches, makes room for %s", session_id, settings.session_id)
                promised -= others[session_id].needed_bytes
                self._expire(session_id)
        if promised + settings.needed_bytes > budget_bytes:
            raise SaturatedError(
                f"{needs}; {promised} of {budget_bytes} bytes are promised to others (sidecast serve --history-gib)"
            )

    def _idle_s(self, session_id: str) -> float:
        return self._clock() - self._last_seen_s[session_id]

    def _expire(self, session_id: str) -> None:
        run_id = self._sessions[session_id].settings.run_id
        self._end(session_id)
        # A run has one session at a time: a resume ends the one before.
        self._metrics.forget_run(run_id)

    def _end(self, session_id: str) -> None:
        self._sessions.pop(session_id).close()
        self._last_seen_s.pop(session_id, None)
        for queue in self._watchers.pop(session_id, []):
            queue.put_nowait(None)
        self._metrics.sessions.set(len(self._sessions))
        self._metrics.history_bytes.set(self._store.used_bytes)

    def expire_sessions(self) -> None:
        """Ends the sessions that nobody has used or watched for the session timeout."""
        for session_id in list(self._sessions):
            is_idle = self._idle_s(session_id) > self._config.session_timeout_s
            if is_idle and not self._watchers.get(session_id):
                log.info("session %s expired", session_id)
                self._expire(session_id)

    # --- nowcasts

    async def _nowcast(self, session: Session, task: NowcastTask) -> None:
        settings = session.settings
        request = NowcastRequest(
            predictor=PredictorRequest(
                predictor=settings.predictor,
                options=settings.predictor_options,
                manifest_json=settings.manifest.to_json(),
                context_len=settings.context_len,
            ),
            state_paths=tuple(vector.path for vector in task.states),
            delta_path=task.delta.path,
            horizon_intervals=task.horizon_intervals,
            max_relative_norm=settings.max_relative_norm,
        )
        try:
            answer = await asyncio.wait_for(self._engines.predict(request), self._config.nowcast_timeout_s)
        except TimeoutError:
            answer = NowcastAnswer(refusal=f"the nowcast took longer than {self._config.nowcast_timeout_s:g} s")
        except Exception:
            log.exception("the nowcast of step %d failed", task.base_step)
            answer = NowcastAnswer(refusal="the predictor failed; the service's log says how")
        prediction = None
        if not answer.refusal:
            prediction = Prediction(task, answer.digest, answer.relative_norm, answer.nowcast_s)
        session.finish(task, prediction, answer.refusal)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        # The loop holds tasks weakly; an unreferenced one may vanish half-way.
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _on_event(self, session_id: str, event: SnapshotEvent | Prediction | FailureEvent) -> None:
        session = self._sessions.get(session_id)
        if session is None:
            return
        run = session.settings.run_id
        match event:
            case SnapshotEvent(reason=""):
                self._metrics.snapshots.labels(run, "committed").inc()
                self._metrics.snapshot_step.labels(run).set(event.step)
            case SnapshotEvent():
                self._metrics.snapshots.labels(run, "aborted").inc()
                log.warning("snapshot of step %d aborted: %s", event.step, event.reason)
            case Prediction():
                self._metrics.predictions.labels(run, "published").inc()
                self._metrics.nowcast_seconds.labels(run, session.settings.predictor).observe(event.nowcast_s)
                self._metrics.relative_norm.labels(run).set(event.relative_norm)
            case FailureEvent():
                self._metrics.predictions.labels(run, "failed").inc()
                log.warning("no nowcast at step %d: %s", event.base_step, event.reason)
        self._metrics.history_bytes.set(self._store.used_bytes)
        message = _event(event, session)
        for queue in self._watchers.get(session_id, []):
            queue.put_nowait(message)

    # --- gRPC

    def handler(self) -> grpc.GenericRpcHandler:
        """The method table for a ``grpc.aio`` server; chunks bypass the protobuf runtime (see the codec)."""
        unary, feed, stream = (
            grpc.unary_unary_rpc_method_handler,
            grpc.stream_unary_rpc_method_handler,
            grpc.unary_stream_rpc_method_handler,
        )
        return grpc.method_handlers_generic_handler(
            SERVICE_NAME,
            {
                "Open": unary(self._answering(self.open), pb.OpenRequest.FromString, _serialize),
                "Join": unary(self._answering(self.join), pb.JoinRequest.FromString, _serialize),
                "Upload": feed(self._answering(self.upload), _decode_or_none, _serialize),
                "Commit": unary(self._answering(self.commit), pb.CommitRequest.FromString, _serialize),
                "Watch": stream(self._streaming(self.watch), pb.WatchRequest.FromString, _serialize),
                "Fetch": stream(self._streaming(self.fetch), pb.FetchRequest.FromString, encode_chunk),
                "Report": unary(self._answering(self.report), pb.ReportRequest.FromString, _serialize),
                "Status": unary(self._answering(self.status), pb.StatusRequest.FromString, _serialize),
            },
        )

    async def _authorize(self, context: grpc.aio.ServicerContext) -> None:
        if self._config.token is None:
            return
        given = dict(context.invocation_metadata() or ()).get(AUTHORIZATION, "")
        given_bytes = given if isinstance(given, bytes) else given.encode()
        # In constant time: the time of a plain comparison tells how much of a guess is right.
        if not hmac.compare_digest(given_bytes, f"Bearer {self._config.token}".encode()):
            self._metrics.refused.labels("UNAUTHENTICATED").inc()
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the call carries no token, or a wrong one")

    async def _refuse(self, context: grpc.aio.ServicerContext, error: Exception) -> NoReturn:
        status, message = grpc.StatusCode.INTERNAL, "the call failed; the service's log says how"
        if isinstance(error, SidecastError):
            kind = next(item for item in type(error).__mro__ if item in _STATUS)
            status, message = _STATUS[kind], str(error)
        else:
            log.error("a call failed", exc_info=error)
        self._metrics.refused.labels(status.name).inc()
        await context.abort(status, message)
        raise AssertionError("abort raises")

    def _answering(self, method: Callable[[Any], Awaitable[Message]]) -> Callable[..., Awaitable[Message]]:
        async def call(request: Any, context: grpc.aio.ServicerContext) -> Message:
            await self._authorize(context)
            try:
                return await method(request)
            except Exception as error:
                await self._refuse(context, error)

        return call

    def _streaming(self, method: Callable[[Any], AsyncGenerator[Any, None]]) -> Callable[..., AsyncIterator[Any]]:
        async def call(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
            await self._authorize(context)
            try:
                # Closed at once when the client goes away, so that a fetch does not pin its vector until collected.
                async with aclosing(method(request)) as messages:
                    async for message in messages:
                        yield message
            except Exception as error:
                await self._refuse(context, error)

        return call


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()


def _decode_or_none(message: bytes) -> ChunkFrame | None:
    # A deserialiser that raises ends the call without a word; None becomes a refusal with one.
    try:
        return decode_chunk(message)
    except CodecError:
        return None


def _json_object(name: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise MalformedError(f"{name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise MalformedError(f"{name} is {value!r}; it must be a JSON object")
    return value


def _shards(messages: Any) -> tuple[ShardSpec, ...]:
    return tuple(ShardSpec(item.parameter, item.start, item.stop) for item in messages)


def _event(event: SnapshotEvent | Prediction | FailureEvent, session: Session) -> pb.SessionEvent:
    match event:
        case SnapshotEvent(reason=""):
            return pb.SessionEvent(
                committed=pb.SnapshotCommitted(step=event.step, epoch=event.epoch, digest=event.digest)
            )
        case SnapshotEvent():
            return pb.SessionEvent(aborted=pb.SnapshotAborted(step=event.step, epoch=event.epoch, reason=event.reason))
        case Prediction():
            return pb.SessionEvent(
                published=pb.PredictionPublished(
                    version=event.task.version,
                    base_step=event.task.base_step,
                    epoch=event.task.epoch,
                    horizon_intervals=event.task.horizon_intervals,
                    digest=event.digest,
                    relative_norm=event.relative_norm,
                    nowcast_seconds=event.nowcast_s,
                    predictor=session.settings.predictor,
                )
            )
        case FailureEvent():
            return pb.SessionEvent(failed=pb.PredictionFailed(base_step=event.base_step, reason=event.reason))
