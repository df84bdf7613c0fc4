"""Sessions of one rank, for tests of what becomes of them."""

from __future__ import annotations

import math
from zlib import crc32

import numpy as np

from sidecast.manifest import ModelManifest
from sidecast.nowcaster_service.session import Session
from sidecast.nowcaster_service.session_events import NowcastTask
from sidecast.nowcaster_service.session_settings import SessionSettings
from sidecast.policies.push import PushConfig
from sidecast.protos import nowcast_pb2 as pb
from sidecast.protos.codec import ChunkFrame, buffer_digest


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
