"""A nowcaster service in this process, with engines that tests control, on a free loopback port."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any
from zlib import crc32

import grpc
import numpy as np
from prometheus_client import CollectorRegistry

from sidecast.manifest import ModelManifest
from sidecast.nowcaster_service.access.callers import callers_of
from sidecast.nowcaster_service.config import ServiceConfig
from sidecast.nowcaster_service.metrics import ServiceMetrics
from sidecast.nowcaster_service.nowcasting import NowcastAnswer, NowcastRequest, PredictorAnswer, PredictorRequest
from sidecast.nowcaster_service.probing.evaluation import ProbeAnswer, ProbeRequest, Probing
from sidecast.nowcaster_service.read_outs.folding import FoldAnswer, FoldRequest, answer_fold
from sidecast.nowcaster_service.server import create_server
from sidecast.nowcaster_service.servicer import Servicer
from sidecast.nowcaster_service.vector_store import HistoryStore
from sidecast.protos import nowcast_pb2 as pb
from sidecast.protos import nowcast_pb2_grpc
from sidecast.protos.bf16 import round_in_place
from sidecast.protos.codec import buffer_digest, vector_digest
from tests.support.limits import HANG_S

CHUNK_BYTES = 64 << 10


class FakeClock:
    """Seconds that only a test moves."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class SteadyEngines:
    """Engines that are always there, and what a service asks of them besides their work.

    Attributes:
        num_replaced: How often one was ended because it took too long.
        num_probes_replaced: The same of what evaluates.
        probing: Evaluates, in a service that has a probe.
    """

    num_replaced = 0
    num_probes_replaced = 0
    probing: Probing | None = None

    async def ready(self) -> None:
        """They are."""

    async def replace(self) -> None:
        self.num_replaced += 1

    async def fold(self, request: FoldRequest) -> FoldAnswer:
        return await asyncio.to_thread(answer_fold, request)

    async def evaluate(self, request: ProbeRequest) -> ProbeAnswer:
        assert self.probing is not None
        return await asyncio.to_thread(self.probing.evaluate, request)

    async def replace_probe(self) -> None:
        self.num_probes_replaced += 1

    def fault(self) -> str:
        return ""


class FakeEngines(SteadyEngines):
    """Predicts newest - oldest state, in float32, or what a test told it to do instead."""

    def __init__(self) -> None:
        self.refusal = ""
        self.answer: NowcastAnswer | Exception | None = None
        self.requests: list[NowcastRequest] = []
        self.may_finish = threading.Event()
        self.may_finish.set()

    async def check(self, request: PredictorRequest) -> PredictorAnswer:
        return PredictorAnswer(refusal=self.refusal, max_horizon=5)

    async def predict(self, request: NowcastRequest) -> NowcastAnswer:
        self.requests.append(request)
        while not self.may_finish.is_set():
            await asyncio.sleep(0.005)
        if isinstance(self.answer, Exception):
            raise self.answer
        if self.answer is not None:
            return self.answer
        newest, oldest = (np.fromfile(request.state_paths[index], np.float32) for index in (-1, 0))
        delta = newest - oldest
        if request.rounds_to_bf16:
            round_in_place(delta)
        delta.tofile(request.delta_path)
        return NowcastAnswer(digest=vector_digest(delta.data.cast("B")), relative_norm=0.1, nowcast_s=0.01)


def service_config(folder: Path, **changes: Any) -> ServiceConfig:
    """Valid settings."""
    settings: dict[str, Any] = {
        "port": 1,
        "history_dir": folder / "vectors",
        "history_budget_bytes": 64 << 20,
        "chunk_bytes": CHUNK_BYTES,
        "nowcast_timeout_s": 20.0,
        "session_timeout_s": 60.0,
    }
    return ServiceConfig(**(settings | changes))


class RunningService:
    """The servicer behind a real ``grpc.aio`` server, on an event loop in a thread; a context manager.

    Args:
        folder: For the history.
        port: 0 for a free one; a given one to come back where an earlier service was.
        engines: Who predicts, if not the fake ones.
        interceptors: Between the wire and the servicer.
        before_start: Called with the servicer before anybody can reach it.
        token: What all clients share; none by default.
        changes: Of the settings.
    """

    def __init__(
        self,
        folder: Path,
        port: int = 0,
        *,
        engines: Any = None,
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
        before_start: Callable[[Servicer], object] | None = None,
        token: str | None = None,
        **changes: Any,
    ) -> None:
        if token is not None:
            changes["token_file"] = folder / "service-token"
            changes["token_file"].write_text(f"{token}\n")
        self.clock = FakeClock()
        self.engines = FakeEngines() if engines is None else engines
        self._interceptors = interceptors
        self._before_start = before_start
        self.config = service_config(folder, **changes)
        self._wanted_port = port
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def call(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Runs something on the service's own loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(HANG_S)

    def expire_sessions(self) -> None:
        async def expire() -> None:
            self.servicer.sessions.expire()

        self.call(expire())

    async def _start(self) -> None:
        self.store = HistoryStore(self.config.history_dir, self.config.history_budget_bytes)
        self.metrics = ServiceMetrics(CollectorRegistry())
        self.servicer = Servicer(self.config, self.store, self.engines, self.metrics, version="test", clock=self.clock)
        if self._before_start is not None:
            self._before_start(self.servicer)
        self._server, self.port = create_server(
            self.servicer, callers_of(self.config), self._wanted_port, self._interceptors
        )
        self.servicer.handover.start()
        await self._server.start()

    def __enter__(self) -> RunningService:
        self._thread.start()
        self.call(self._start())
        self.endpoint = f"127.0.0.1:{self.port}"
        self.channel = grpc.insecure_channel(
            self.endpoint, [("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]
        )
        self.stub = nowcast_pb2_grpc.NowcasterStub(self.channel)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.engines.may_finish.set()
        self.channel.close()
        self.call(self._server.stop(None))
        self.call(self.servicer.handover.stop())
        self.store.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(HANG_S)
        self._loop.close()


MANIFEST = ModelManifest.from_shapes([("a", (3, 5)), ("b", (40_000,))], {"model_type": "toy"}, {"tied": "a"})
# Rank 0: the first two rows of a and half of b; rank 1: the rest, in another order than the vector's.
SHARDS = {
    0: [(0, 0, 10), (1, 0, 20_000)],
    1: [(1, 20_000, 40_000), (0, 10, 15)],
}


def open_request(manifest: ModelManifest = MANIFEST, **changes: Any) -> pb.OpenRequest:
    """An announcement that the service accepts."""
    fields: dict[str, Any] = {
        "session_id": "s1",
        "run_id": "run",
        "world_size": 2,
        "manifest": pb.Manifest(
            parameters=[pb.Parameter(fqn=spec.fqn, shape=spec.shape) for spec in manifest.parameters],
            config_json='{"model_type": "toy"}',
            aliases=manifest.aliases,
        ),
        "schema_hash": manifest.schema_hash,
        "context_len": 2,
        "snapshot_interval_steps": 10,
        "period_steps": 20,
        "predictor": "fake",
        "max_relative_norm": 0.5,
    }
    return pb.OpenRequest(**(fields | changes))


def join_request(rank: int, session_id: str = "s1", shards: list[tuple[int, int, int]] | None = None) -> pb.JoinRequest:
    items = [pb.Shard(parameter=p, start=a, stop=b) for p, a, b in (SHARDS[rank] if shards is None else shards)]
    return pb.JoinRequest(session_id=session_id, rank=rank, upload_shards=items, fetch_shards=items)


def rank_bytes(vector: np.ndarray, rank: int) -> bytes:
    """A rank's buffer, cut from the parameter vector."""
    offsets = [0, 15]
    return b"".join(vector[offsets[p] + a : offsets[p] + b].tobytes() for p, a, b in SHARDS[rank])


def chunks(data: bytes, rank: int, step: int, epoch: int = 0, session_id: str = "s1") -> list[pb.Chunk]:
    """A rank's part of a snapshot as messages."""
    key = pb.ChunkKey(session_id=session_id, rank=rank, id=step, epoch=epoch)
    pieces = [(start, data[start : start + CHUNK_BYTES]) for start in range(0, len(data), CHUNK_BYTES)]
    return [pb.Chunk(key=key, offset_bytes=start, crc32=crc32(piece), data=piece) for start, piece in pieces]


def commit_request(messages: list[pb.Chunk]) -> pb.CommitRequest:
    """The seal that fits these chunks."""
    key = messages[0].key
    return pb.CommitRequest(
        session_id=key.session_id,
        rank=key.rank,
        step=key.id,
        epoch=key.epoch,
        num_bytes=sum(len(item.data) for item in messages),
        digest=buffer_digest((item.offset_bytes, len(item.data), item.crc32) for item in messages),
    )


def state(seed: int) -> np.ndarray:
    """One state of the model, as a parameter vector."""
    return np.random.default_rng(seed).standard_normal(MANIFEST.num_elements).astype(np.float32)
