"""From an announcement to settings: everything that can be wrong with a run is refused here, before its first step."""

from __future__ import annotations

import json
import math
from typing import Any, Protocol

from sidecast.horizon import resolve_horizons
from sidecast.manifest import ModelManifest
from sidecast.nowcaster_service.errors import MalformedError
from sidecast.nowcaster_service.nowcasting import PredictorAnswer, PredictorRequest
from sidecast.nowcaster_service.session_settings import SessionSettings
from sidecast.protos import nowcast_pb2 as pb

MAX_NOWCASTS = 1_000_000
# A window of it is listed, looked up and opened at every nowcast.
MAX_CONTEXT_LEN = 1_000


class PredictorChecks(Protocol):
    """Whoever knows whether a predictor can serve a model; does not wait for nowcasts that are being made."""

    async def check(self, request: PredictorRequest) -> PredictorAnswer: ...


async def admit(request: pb.OpenRequest, checks: PredictorChecks) -> SessionSettings:
    """The settings of a run that can be served.

    Raises:
        MalformedError: It can never be served as it is.
    """
    manifest = ModelManifest.from_shapes(
        ((item.fqn, item.shape) for item in request.manifest.parameters),
        _json_object("manifest.config_json", request.manifest.config_json),
        dict(request.manifest.aliases),
    )
    _check_scalars(request, manifest)
    options = _json_object("predictor_options_json", request.predictor_options_json)
    answer = await checks.check(
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
        rounds_to_bf16=request.wire_dtype == pb.BF16,
    )


def _check_scalars(request: pb.OpenRequest, manifest: ModelManifest) -> None:
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
    if request.max_steps // request.period_steps > MAX_NOWCASTS:
        raise MalformedError(
            f"max_steps is {request.max_steps}; allowed: {MAX_NOWCASTS} periods of {request.period_steps} steps"
        )


def _json_object(name: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise MalformedError(f"{name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise MalformedError(f"{name} is {value!r}; it must be a JSON object")
    return value
