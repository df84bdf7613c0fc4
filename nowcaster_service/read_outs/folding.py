"""Averaging one state into one read-out, over files on this node.

It runs at the speed of memory: 8 bytes are read and 4 written per parameter to average, 4 read to name the result by a
digest. The new average is a file of its own, so that the one before is whole whatever happens.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from sidecast.errors import SidecastError
from sidecast.manifest import ModelManifest
from sidecast.nowcaster_service.vector_files import map_vector
from sidecast.policies.read_outs import fold
from sidecast.protos.codec import vector_digest


@dataclass(frozen=True, kw_only=True)
class FoldRequest:
    """One state for one read-out; all files are of P fp32 values on this node.

    Attributes:
        manifest_json: The model.
        state_path: The state.
        before_path: The average so far; None if the state is its first.
        out_path: To be overwritten with the new average.
        share: Weight of the state.
    """

    manifest_json: str
    state_path: Path
    before_path: Path | None
    out_path: Path
    share: float


@dataclass(frozen=True, kw_only=True)
class FoldAnswer:
    """What came of it. ``refusal`` says why there is no new average, and is empty if there is one."""

    refusal: str = ""
    digest: int = 0
    fold_s: float = 0.0


def answer_fold(request: FoldRequest) -> FoldAnswer:
    """Averages, and names the result."""
    started_s = time.perf_counter()
    manifest = ModelManifest.from_json(request.manifest_json)
    try:
        state_P = map_vector(request.state_path, manifest, torch.float32)
        out_P = map_vector(request.out_path, manifest, torch.float32, writable=True)
        before_P = None if request.before_path is None else map_vector(request.before_path, manifest, torch.float32)
    except SidecastError as error:
        return FoldAnswer(refusal=str(error))
    if not fold(before_P, state_P, request.share, out_P):
        return FoldAnswer(refusal="the state is not finite")
    return FoldAnswer(digest=vector_digest(out_P.numpy().data.cast("B")), fold_s=time.perf_counter() - started_s)
