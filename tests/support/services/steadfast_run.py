"""Two ranks of one run that send what they have until it is taken, whatever becomes of their service."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

import grpc
import numpy as np

from sidecast.protos import nowcast_pb2 as pb
from sidecast.protos import nowcast_pb2_grpc
from sidecast.protos.bf16 import from_bf16, round_to_bf16
from sidecast.protos.codec import buffer_digest
from sidecast.protos.transport import RUN_SECRET_KEY
from sidecast.protos.version import PROTOCOL_VERSION
from tests.support.limits import HANG_S
from tests.support.services.harness import SHARDS, join_request, open_request, rank_bytes, state
from tests.support.services.mortal import MortalService

CHUNK_BYTES = 16 << 10
INTERVAL_STEPS = 10
NUM_SNAPSHOTS = 9
OWN = ((RUN_SECRET_KEY, "0123456789abcdef" * 2),)
JUMPS: dict[str, Any] = {"context_len": 3, "period_steps": 30, "predictor": "linear", "max_relative_norm": 1e6}
KINDS: dict[str, dict[str, Any]] = {
    "fp32": JUMPS,
    "bf16": {**JUMPS, "wire_dtype": pb.BF16},
    "push": {
        "context_len": 2,
        "period_steps": INTERVAL_STEPS,
        "max_relative_norm": 1e6,
        "push": pb.Push(time_constant_steps=30.0, gain=1.0, start_step=20),
    },
}


@dataclass
class Given:
    """What a run was given.

    Attributes:
        predictions: By base step: version, digest, and the bytes of each rank.
        losses: What each rank was told that a restart has cost.
        num_resent: How often a state was sent because the service did not hold what a change is since.
    """

    predictions: dict[int, tuple[int, int, list[bytes]]] = field(default_factory=dict)
    losses: list[list[str]] = field(default_factory=lambda: [[], []])
    num_resent: int = 0


class SteadfastRun:
    """One run; its weights move by steps of its own, and with pushes by every other push.

    Args:
        service: Which may die at any moment.
        kind: Of ``KINDS``.
        deaths: How the next services die, those after the first one, and at which step or event.

    Attributes:
        given: What it has been given.
    """

    def __init__(self, service: MortalService, kind: str, deaths: Iterable[tuple[str, int]] = ()) -> None:
        self.service = service
        self.kind = kind
        self.given = Given()
        self._deaths = iter(deaths)
        self.state_P = state(0)
        self.epoch = 0
        self.applied = (0, 0.0)
        self.learning_rate_sum = 0.0
        self.held = [np.zeros(0), np.zeros(0)]
        self.digests = [b"", b""]
        self.base_step = 0
        self._connect_or_go_on()

    def _connect(self) -> None:
        options = [("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]
        self.channel = grpc.insecure_channel(f"127.0.0.1:{self.service.port}", options)
        self.stub = nowcast_pb2_grpc.NowcasterStub(self.channel)
        request = open_request(protocol_version=PROTOCOL_VERSION, **KINDS[self.kind])
        self._call(self.stub.Open, request)
        for rank in (0, 1):
            self._call(self.stub.Join, join_request(rank))
        self.watches = [
            self.stub.Watch(pb.WatchRequest(session_id="s1", rank=rank), timeout=HANG_S, metadata=OWN)
            for rank in (0, 1)
        ]

    def _call(self, method: Any, request: Any) -> Any:
        return method(request, timeout=HANG_S, metadata=OWN, wait_for_ready=True)

    def train(self) -> Given:
        """Sends all snapshots, and waits for what each may lead to."""
        for index in range(1, NUM_SNAPSHOTS + 1):
            step = INTERVAL_STEPS * index
            self.state_P = self.state_P + np.float32(0.1) * state(index)
            self.learning_rate_sum += 0.01 * index
            while not self._is_done(step):
                pass
        self.channel.close()
        return self.given

    def _is_done(self, step: int) -> bool:
        try:
            parts = [self._send(step, rank) for rank in (0, 1)]
            if (self.kind == "push" and step >= 20) or (self.kind != "push" and step % 30 == 0):
                self._await_prediction(step)
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
            self._go_on()
            return False
        for rank, (held_N, digest) in enumerate(parts):
            self.held[rank], self.digests[rank] = held_N, digest
        self.base_step = step
        return True

    def _go_on(self) -> None:
        self.service.await_death()
        self.channel.close()
        self.service.start(*next(self._deaths, ("", 0)))
        self._connect_or_go_on()

    def _connect_or_go_on(self) -> None:
        try:
            self._connect()
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
            self._go_on()

    def _send(self, step: int, rank: int) -> tuple[np.ndarray, bytes]:
        part_N = np.frombuffer(rank_bytes(self.state_P, rank), np.float32)
        if self.kind == "bf16" and self.base_step:
            try:
                change_N = round_to_bf16(part_N - self.held[rank])
                digest = self._send_bytes(step, rank, change_N.tobytes(), pb.BF16, self.base_step, self.digests[rank])
                return self.held[rank] + from_bf16(change_N), digest
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.ABORTED:
                    raise
                self.given.num_resent += 1
        return part_N, self._send_bytes(step, rank, part_N.tobytes(), pb.FP32, 0, b"")

    def _send_bytes(
        self, step: int, rank: int, data: bytes, dtype: pb.WireDtype, base_step: int, base_digest: bytes
    ) -> bytes:
        key = pb.ChunkKey(session_id="s1", rank=rank, id=step, epoch=self.epoch, dtype=dtype, base_step=base_step)
        pieces = [(start, data[start : start + CHUNK_BYTES]) for start in range(0, len(data), CHUNK_BYTES)]
        messages = [pb.Chunk(key=key, offset_bytes=start, crc32=crc32(piece), data=piece) for start, piece in pieces]
        self._call(self.stub.Upload, iter(messages))
        digest = buffer_digest([(start, len(piece), crc32(piece)) for start, piece in pieces], base_digest)
        request = pb.CommitRequest(
            session_id="s1",
            rank=rank,
            step=step,
            epoch=self.epoch,
            num_bytes=len(data),
            digest=digest,
            dtype=dtype,
            base_step=base_step,
        )
        if self.kind == "push":
            request.learning_rate_sum = self.learning_rate_sum
            request.applied_version, request.applied_weight = self.applied
        self._call(self.stub.Commit, request)
        return digest

    def _await_prediction(self, step: int) -> None:
        events = [self._events_until(rank, step) for rank in (0, 1)]
        if None in events:
            # A loss that was told is of this very step: there is no prediction to wait for.
            return
        event = events[0]
        assert event == events[1]
        parts = [
            b"".join(
                chunk.data
                for chunk in self._call(
                    self.stub.Fetch, pb.FetchRequest(session_id="s1", rank=rank, version=event.version)
                )
            )
            for rank in (0, 1)
        ]
        self.given.predictions[step] = event.version, event.digest, parts
        if self.kind == "push" and step % 20 == 0:
            offsets = [0, 15]
            delta_P = np.empty_like(self.state_P)
            for rank, part in enumerate(parts):
                values_N, start = np.frombuffer(part, np.float32), 0
                for p, a, b in SHARDS[rank]:
                    delta_P[offsets[p] + a : offsets[p] + b] = values_N[start : start + b - a]
                    start += b - a
            self.state_P = self.state_P + delta_P * np.float32(0.5)
            self.applied, self.epoch = (event.version, 0.5), self.epoch + 1

    def _events_until(self, rank: int, step: int) -> pb.PredictionPublished | None:
        for event in self.watches[rank]:
            if event.WhichOneof("event") == "published" and event.published.base_step == step:
                return event.published
            if event.WhichOneof("event") == "failed":
                self.given.losses[rank].append(event.failed.reason)
                assert event.failed.base_step == step
                return None
        raise AssertionError("the session has ended")
