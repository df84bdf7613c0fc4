"""What an engine does: check that a predictor can serve a model, and make and check one prediction.

Free of Ray and gRPC. Requests and results are plain data, since they travel between processes.
"""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from sidecast.errors import SidecastError
from sidecast.manifest import ModelManifest
from sidecast.nowcaster_service.pushing import PushRequest, make_push
from sidecast.nowcaster_service.vector_files import HistoryFiles, map_vector
from sidecast.predictors.base import ModelPredictor, Predictor, check_context_len
from sidecast.predictors.file_workspace import predict_with_files
from sidecast.predictors.jump_norm import jump_norm
from sidecast.predictors.passes import PassPredictor
from sidecast.predictors.registry import create_predictor, takes_option
from sidecast.protos.bf16 import round_in_place
from sidecast.protos.codec import vector_digest

# Those used last; another one is made anew when a run asks for it.
MAX_PREDICTORS = 16


@dataclass(frozen=True, kw_only=True)
class PredictorRequest:
    """Which predictor is to serve which model, and how far ahead at most (0: as far as it likes)."""

    predictor: str
    options: Mapping[str, object]
    manifest_json: str
    context_len: int
    max_horizon: int = 0


@dataclass(frozen=True, kw_only=True)
class PredictorAnswer:
    """Whether it can. ``refusal`` is empty if so; ``max_horizon`` is the predictor's own K in intervals."""

    refusal: str = ""
    max_horizon: int = 0


@dataclass(frozen=True, kw_only=True)
class NowcastRequest:
    """One nowcast over files on this node.

    Attributes:
        predictor: Predictor and model.
        state_paths: C files of P fp32 values, oldest first.
        delta_path: File of P fp32 values to be overwritten with prediction - newest state.
        horizon_intervals: k.
        max_relative_norm: Largest accepted ||delta|| / ||newest state||.
        rounds_to_bf16: The delta is to hold only values that bf16 holds exactly, as it will travel.
    """

    predictor: PredictorRequest
    state_paths: tuple[Path, ...]
    delta_path: Path
    horizon_intervals: int
    max_relative_norm: float
    rounds_to_bf16: bool = False


@dataclass(frozen=True, kw_only=True)
class NowcastAnswer:
    """Its result. ``refusal`` says why the prediction must not be published, and is empty if it may be.

    ``is_empty``: nothing went wrong, and there is nothing to publish. ``carry_digest``: of a run's new average motion.
    """

    refusal: str = ""
    is_empty: bool = False
    digest: int = 0
    relative_norm: float = 0.0
    nowcast_s: float = 0.0
    carry_digest: int = 0


class Runner(Protocol):
    """Where predictions are computed: in this process, or divided among others."""

    def prepare(self, predictor: Predictor, manifest: ModelManifest, horizon_intervals: int) -> None:
        """Builds what depends on the model alone where it will be needed.

        Args:
            predictor: The predictor.
            manifest: The model.
            horizon_intervals: How far ahead it will be asked at most; 0 if that is left to the predictor.

        Raises:
            ConfigError: The predictor cannot work there, on this model or so far ahead.
        """
        ...

    def predict(self, predictor: Predictor, files: HistoryFiles, horizon_intervals: int, delta_path: Path) -> None:
        """Writes the predicted change to a file of P fp32 values."""
        ...


class LocalRunner:
    """Computes predictions in this process."""

    def prepare(self, predictor: Predictor, manifest: ModelManifest, horizon_intervals: int) -> None:
        if isinstance(predictor, ModelPredictor):
            predictor.prepare(manifest)
        if isinstance(predictor, PassPredictor) and horizon_intervals > 0:
            predictor.plan(manifest, horizon_intervals)

    def predict(self, predictor: Predictor, files: HistoryFiles, horizon_intervals: int, delta_path: Path) -> None:
        delta_P = map_vector(delta_path, files.manifest, torch.float32, writable=True)
        predict_with_files(predictor, files.open(), horizon_intervals, delta_P, delta_path.parent)


class Nowcasting:
    """Makes nowcasts with predictors that are built once and kept.

    Args:
        weights: Weights for the predictors that need them; None if there are none.
        device: Where predictors that can choose compute, unless a request says otherwise; None leaves it to them.
        runner: How predictions are computed; in this process if None.
    """

    def __init__(self, weights: Path | None, *, device: str | None = None, runner: Runner | None = None) -> None:
        self._weights = weights
        self._device = device
        self._runner = LocalRunner() if runner is None else runner
        # Checks and predictions run in threads of their own.
        self._lock = threading.Lock()
        self._predictors: OrderedDict[tuple[str, str], Predictor] = OrderedDict()
        self._being_made: dict[tuple[str, str], threading.Lock] = {}

    def check(self, request: PredictorRequest) -> PredictorAnswer:
        """Builds the predictor and everything that it derives from the model, or says why it cannot."""
        try:
            predictor = self._predictor(request)
            check_context_len(predictor, request.context_len)
            self._runner.prepare(predictor, ModelManifest.from_json(request.manifest_json), request.max_horizon)
        except SidecastError as error:
            return PredictorAnswer(refusal=str(error))
        return PredictorAnswer(max_horizon=predictor.max_horizon)

    def predict(self, request: NowcastRequest) -> NowcastAnswer:
        """Writes the delta, then checks that it is finite and not larger than allowed."""
        started_s = time.perf_counter()
        manifest = ModelManifest.from_json(request.predictor.manifest_json)
        try:
            files = HistoryFiles(manifest=manifest, paths=request.state_paths)
            predictor = self._predictor(request.predictor)
            # Before anything is computed, and not again: what is checked and named below is what was predicted.
            history = files.open()
            delta_P = map_vector(request.delta_path, manifest, torch.float32, writable=True)
            self._runner.predict(predictor, files, request.horizon_intervals, request.delta_path)
        except SidecastError as error:
            return NowcastAnswer(refusal=str(error))
        if request.rounds_to_bf16:
            # What is checked, named by the digest and sent is what every rank will apply.
            round_in_place(delta_P.numpy())
        return _checked(request, manifest, delta_P, history.states[-1], started_s)

    def push(self, request: PushRequest) -> NowcastAnswer:
        """Averages a run's own motion and writes the push, then checks it as any prediction."""
        started_s = time.perf_counter()
        manifest = ModelManifest.from_json(request.manifest_json)
        try:
            made = make_push(request)
            if made.is_empty:
                return NowcastAnswer(is_empty=True, carry_digest=made.carry_digest)
            delta_P = map_vector(request.delta_path, manifest, torch.float32)
            state_P = map_vector(request.state_path, manifest, torch.float32)
        except SidecastError as error:
            return NowcastAnswer(refusal=str(error))
        return replace(_checked(request, manifest, delta_P, state_P, started_s), carry_digest=made.carry_digest)

    def _predictor(self, request: PredictorRequest) -> Predictor:
        key = (request.predictor, repr(sorted(request.options.items())))
        with self._lock:
            being_made = self._being_made.setdefault(key, threading.Lock())
        # Those who need the same wait for one another, and nobody for the making of something else.
        with being_made:
            if (predictor := self._kept(key)) is not None:
                return predictor
            weights = self._weights if takes_option(request.predictor, "weights") else None
            options = dict(request.options)
            if self._device is not None and takes_option(request.predictor, "device"):
                options.setdefault("device", self._device)
            try:
                predictor = create_predictor(request.predictor, weights=weights, options=options)
                with self._lock:
                    self._predictors[key] = predictor
                    if len(self._predictors) > MAX_PREDICTORS:
                        self._predictors.popitem(last=False)
            finally:
                with self._lock:
                    self._being_made.pop(key, None)
            return predictor

    def _kept(self, key: tuple[str, str]) -> Predictor | None:
        with self._lock:
            if key not in self._predictors:
                return None
            self._being_made.pop(key, None)
            self._predictors.move_to_end(key)
            return self._predictors[key]


def _checked(
    request: NowcastRequest | PushRequest, manifest: ModelManifest, delta_P: Tensor, base_P: Tensor, started_s: float
) -> NowcastAnswer:
    """Looks at the size of a predicted change, and names it."""
    relative_norm = jump_norm(delta_P, base_P)
    if not math.isfinite(relative_norm):
        return NowcastAnswer(refusal=f"the prediction is not finite: {_first_bad_tensor(manifest, delta_P)}")
    if relative_norm > request.max_relative_norm:
        return NowcastAnswer(
            refusal=f"the jump's relative norm is {relative_norm:.4g}; allowed: {request.max_relative_norm:g}"
        )
    return NowcastAnswer(
        digest=vector_digest(delta_P.numpy().data.cast("B")),
        relative_norm=relative_norm,
        nowcast_s=time.perf_counter() - started_s,
    )


def _first_bad_tensor(manifest: ModelManifest, delta_P: Tensor) -> str:
    for spec in manifest.parameters:
        start = manifest.offsets[spec.fqn]
        if not bool(torch.isfinite(delta_P[start : start + spec.numel]).all()):
            return f"first in {spec.fqn}"
    return "the base state is zero or not finite"
