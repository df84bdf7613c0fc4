"""What rank 0 announces of a run, checked, and what follows from it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from sidecast.horizon import horizon_at, resolve_horizons
from sidecast.manifest import ModelManifest
from sidecast.nowcaster_service.errors import MalformedError
from sidecast.nowcaster_service.vector_store import FP32_BYTES
from sidecast.policies.push import CONTEXT_LEN, PushConfig
from sidecast.policies.read_outs import MAX_KEEP_BEST, ReadOut, read_outs_of
from sidecast.protos import nowcast_pb2 as pb

MAX_NOWCASTS = 1_000_000
# A window of it is listed, looked up and opened at every nowcast.
MAX_CONTEXT_LEN = 1_000
# A second snapshot may begin before the last rank has finished the first; a third means that somebody gave up.
MAX_RECEIVING = 2
# Beside the c states of the window: those being received, and a prediction each being made, published and, though
# replaced, still fetched.
NUM_EXTRA_VECTORS = MAX_RECEIVING + 3
# With pushes: the state that is received, the one before, the average, and the published push.
NUM_PUSH_VECTORS = 4
# Of a run that wants none: the state that is received, and the one before.
NUM_IDLE_VECTORS = 2
# Beside one for each read-out: the new average that is being written, and one that, though replaced, is still exported.
NUM_READ_OUT_VECTORS = 2
# With a probe, beside one for each read-out, which may be replaced while it is evaluated: the copy of the state, and
# the model that is evaluated, though no file holds it.
NUM_PROBE_VECTORS = 2
# Fields that say nothing of what is predicted, or that are said in another way.
_OF_A_SESSION = frozenset(
    ("session_id", "world_size", "manifest", "predictor_options", "read_outs", "keep_best", "probe", "probe_fault")
)


@dataclass(frozen=True, kw_only=True)
class SessionSettings:
    """What rank 0 announced, already validated.

    Attributes:
        session_id: New at every attach and resume.
        run_id: The same for all sessions of one run.
        world_size: Number of ranks.
        manifest: The model.
        context_len: c, states per nowcast.
        snapshot_interval_steps: Optimizer steps between snapshots.
        period_steps: Optimizer steps between nowcasts.
        horizons: Horizon of the n-th nowcast in snapshot intervals; the last one repeats.
        predictor: Name of the predictor.
        predictor_options: Its options.
        max_relative_norm: Largest accepted ||prediction - base|| / ||base||.
        rounds_to_bf16: Predictions are rounded to bf16 before they are checked and published.
        push: Of a run with pushes instead of jumps; None for jumps.
        read_outs: Averages of the run's states that are kept.
        keep_best: So many of them, of whatever step, are kept for their losses on the probe.
        probe: Name of the service's probe that these are evaluated on; empty for none.
        probe_fault: Why they are not, though the service has one; empty if they are, or if there is nothing to say.
    """

    session_id: str
    run_id: str
    world_size: int
    manifest: ModelManifest
    context_len: int
    snapshot_interval_steps: int
    period_steps: int
    horizons: tuple[int, ...]
    predictor: str
    predictor_options: Mapping[str, object]
    max_relative_norm: float
    rounds_to_bf16: bool = False
    push: PushConfig | None = None
    read_outs: tuple[ReadOut, ...] = ()
    keep_best: int = 0
    probe: str = ""
    probe_fault: str = ""

    def horizon_at(self, base_step: int) -> int:
        """The horizon of the nowcast made at a step, in snapshot intervals: a function of the step alone."""
        return horizon_at(self.horizons, base_step, self.period_steps)

    def window(self, base_step: int) -> list[int]:
        """Steps of the snapshots that the nowcast made at a step looks at, oldest first."""
        return [base_step - i * self.snapshot_interval_steps for i in reversed(range(self.context_len))]

    def predicts_like(self, other: SessionSettings) -> bool:
        """Whether its nowcasts would be those of another session of the run, however many ranks share them."""
        if self.manifest.schema_hash != other.manifest.schema_hash:
            return False
        return self._of_no_session() == replace(other._of_no_session(), manifest=self.manifest)

    def _of_no_session(self) -> SessionSettings:
        return replace(self, session_id="", world_size=0, read_outs=(), keep_best=0, probe="", probe_fault="")

    @property
    def likeness(self) -> str:
        """Names what ``predicts_like`` compares, for another service: 32 hexadecimal digits."""
        parts = [f"{item.name}={getattr(self, item.name)!r}" for item in fields(self) if item.name not in _OF_A_SESSION]
        options = sorted(self.predictor_options.items())
        text = "\n".join([*parts, f"options={options!r}", self.manifest.schema_hash])
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    @property
    def num_vector_bytes(self) -> int:
        return self.manifest.num_elements * FP32_BYTES

    @property
    def needed_bytes(self) -> int:
        """Most history that this session can hold at once."""
        if self.push is None:
            # A state that is being averaged may have left the window.
            num_vectors = self.context_len + NUM_EXTRA_VECTORS + bool(self.read_outs)
        else:
            num_vectors = NUM_PUSH_VECTORS if self.makes_pushes else NUM_IDLE_VECTORS
        if self.read_outs:
            num_vectors += len(self.read_outs) + NUM_READ_OUT_VECTORS
        if self.probe:
            num_vectors += len(self.read_outs) + NUM_PROBE_VECTORS + self.keep_best
        return num_vectors * self.num_vector_bytes

    @property
    def makes_pushes(self) -> bool:
        """Whether there will ever be one: a run with a gain of 0 wants its read-outs alone."""
        return self.push is not None and self.push.gain > 0

    @property
    def max_receiving(self) -> int:
        """Snapshots that may be on their way at once."""
        # A rank with pushes that is ahead waits for the others.
        return MAX_RECEIVING if self.push is None else 1


def check_scalars(request: pb.OpenRequest, manifest: ModelManifest) -> None:
    """Refuses scalar fields with which no predictor could serve the run.

    Args:
        request: The announcement.
        manifest: The model that it describes.

    Raises:
        MalformedError: A field is missing or out of range, named with its value and what is allowed.
    """
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
    if request.wire_dtype not in pb.WireDtype.values():
        raise MalformedError(f"wire_dtype is {request.wire_dtype}; allowed: {', '.join(pb.WireDtype.keys())}")
    if not 2 <= request.context_len <= MAX_CONTEXT_LEN:
        raise MalformedError(f"context_len is {request.context_len}; allowed: 2 to {MAX_CONTEXT_LEN}")
    # No number would be above NaN: every jump would pass.
    if not request.max_relative_norm >= 0:
        raise MalformedError(f"max_relative_norm is {request.max_relative_norm}; allowed: 0 (any jump) or more")
    if request.period_steps % request.snapshot_interval_steps != 0:
        raise MalformedError(
            f"period_steps is {request.period_steps}; allowed: multiples of snapshot_interval_steps "
            f"({request.snapshot_interval_steps})"
        )
    if request.HasField("push") and (request.context_len, request.period_steps) != (
        CONTEXT_LEN,
        request.snapshot_interval_steps,
    ):
        raise MalformedError(
            f"context_len is {request.context_len} and period_steps {request.period_steps}; allowed with push: "
            f"{CONTEXT_LEN} and snapshot_interval_steps ({request.snapshot_interval_steps})"
        )
    if request.keep_best > MAX_KEEP_BEST or (request.keep_best and not request.read_outs):
        raise MalformedError(
            f"keep_best is {request.keep_best}; allowed: 0 to {MAX_KEEP_BEST}, and 0 without read_outs"
        )
    if request.max_steps // request.period_steps > MAX_NOWCASTS:
        raise MalformedError(
            f"max_steps is {request.max_steps}; allowed: {MAX_NOWCASTS} periods of {request.period_steps} steps"
        )


def settings_of(
    request: pb.OpenRequest, manifest: ModelManifest, options: Mapping[str, object], max_horizon: int
) -> SessionSettings:
    """What an announcement says whose scalar fields have been checked.

    Args:
        request: The announcement.
        manifest: The model that it describes.
        options: The predictor's options.
        max_horizon: K, the predictor's own horizon in snapshot intervals, for a run that names none.

    Raises:
        ConfigError: The horizon's schedule or power, or a field of the pushes, is not one that is allowed.
    """
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
            max_horizon,
        ),
        predictor=request.predictor,
        predictor_options=options,
        max_relative_norm=request.max_relative_norm or math.inf,
        rounds_to_bf16=request.wire_dtype == pb.BF16,
        push=_push_of(request),
        read_outs=read_outs_of(request.read_outs),
        keep_best=request.keep_best,
    )


def _push_of(request: pb.OpenRequest) -> PushConfig | None:
    if not request.HasField("push"):
        return None
    push = request.push
    return PushConfig(
        interval_steps=request.snapshot_interval_steps,
        time_constant_steps=push.time_constant_steps,
        gain=push.gain,
        start_step=push.start_step,
        stop_step=push.stop_step if push.HasField("stop_step") else None,
        max_relative_norm=push.max_relative_norm if push.HasField("max_relative_norm") else None,
    )
