"""What is left of a service after kill -9, in this process: nothing was given back, nothing was closed in order.

And runs that leave it: protected ones on the wire, and sessions of one rank without it.
"""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

from sidecast.manifest import ModelManifest
from sidecast.nowcaster_service.keeping.examination import Found, examine
from sidecast.nowcaster_service.keeping.run_folder import key_of
from sidecast.nowcaster_service.keeping.sealed import read_sealed
from sidecast.nowcaster_service.session import Session
from sidecast.nowcaster_service.session_events import NowcastTask
from sidecast.nowcaster_service.session_settings import SessionSettings
from sidecast.nowcaster_service.vector_store import RECORD_NAME, HistoryStore
from sidecast.policies.push import PushConfig
from sidecast.protos import nowcast_pb2 as pb
from sidecast.protos.codec import ChunkFrame, buffer_digest
from sidecast.protos.transport import RUN_SECRET_KEY
from sidecast.protos.version import PROTOCOL_VERSION
from tests.support.limits import HANG_S
from tests.support.services.calls import next_event
from tests.support.services.harness import (
    RunningService,
    chunks,
    commit_request,
    join_request,
    open_request,
    rank_bytes,
    state,
)

SECRET = "0123456789abcdef" * 2
OWN = ((RUN_SECRET_KEY, SECRET),)


def abandon(store: HistoryStore) -> None:
    """The system lets go of a dead process's lock, and of nothing else."""
    os.close(store._lock._descriptor)


def reopened(store: HistoryStore) -> HistoryStore:
    """The store of the next service, after this one's has died."""
    abandon(store)
    return HistoryStore(store.folder.parent, store.budget_bytes)


def examined(folder: Path, run_id: str, secret: str = SECRET) -> Found:
    """What is found in what is left of a run."""
    return examine(folder, read_sealed(folder / RECORD_NAME), key_of(secret, run_id), 0.0)


# --- protected runs


def begin(service: RunningService, session_id: str = "s1", **changes: Any) -> None:
    request = open_request(session_id=session_id, protocol_version=PROTOCOL_VERSION, **changes)
    service.stub.Open(request, metadata=OWN, timeout=HANG_S)
    for rank in (0, 1):
        service.stub.Join(join_request(rank, session_id), metadata=OWN)


def send(service: RunningService, step: int, session_id: str = "s1", epoch: int = 0) -> None:
    for rank in (0, 1):
        messages = chunks(rank_bytes(state(step), rank), rank, step, epoch, session_id)
        service.stub.Upload(iter(messages), metadata=OWN)
        service.stub.Commit(commit_request(messages), metadata=OWN)


def watch(service: RunningService, rank: int = 0, session_id: str = "s1") -> Any:
    request = pb.WatchRequest(session_id=session_id, rank=rank)
    return service.stub.Watch(request, timeout=HANG_S, metadata=OWN)


def published(service: RunningService, base_step: int, session_id: str = "s1") -> Any:
    events = watch(service, session_id=session_id)
    while (event := next_event(events, "published")).base_step != base_step:
        pass
    events.cancel()
    return event


def fetched(service: RunningService, rank: int, version: int, session_id: str = "s1") -> bytes:
    request = pb.FetchRequest(session_id=session_id, rank=rank, version=version)
    return b"".join(chunk.data for chunk in service.stub.Fetch(request, metadata=OWN))


def as_if_killed(service: RunningService, folder: Path) -> Path:
    """What kill -9 would leave of a service now, in another folder."""
    shutil.copytree(service.config.history_dir, folder / "vectors", ignore=shutil.ignore_patterns("*.sock"))
    return folder


# --- sessions of one rank


def push_settings(manifest: ModelManifest, push: PushConfig) -> SessionSettings:
    """Of a run with pushes."""
    return SessionSettings(
        session_id="s1",
        run_id="run",
        world_size=1,
        manifest=manifest,
        context_len=2,
        snapshot_interval_steps=push.interval_steps,
        period_steps=push.interval_steps,
        horizons=(1,),
        predictor="push",
        predictor_options={},
        max_relative_norm=math.inf,
        push=push,
    )


def send_state(session: Session, step: int, values: np.ndarray) -> NowcastTask | None:
    """Uploads and commits a state, with a sum of learning rates that grows with the steps."""
    data = memoryview(values.astype(np.float32).tobytes())
    key = pb.ChunkKey(rank=0, id=step)
    session.receive(ChunkFrame(key, 0, crc32(data), data))
    return session.commit(
        pb.CommitRequest(
            rank=0,
            step=step,
            num_bytes=len(data),
            digest=buffer_digest([(0, len(data), crc32(data))]),
            learning_rate_sum=float(step),
        )
    )
