"""From an announcement to settings: everything that can be wrong with a run is refused here, before its first step."""

from __future__ import annotations

import json
from typing import Any, Protocol

from sidecast.manifest import ModelManifest
from sidecast.nowcaster_service.errors import MalformedError
from sidecast.nowcaster_service.nowcasting import PredictorAnswer, PredictorRequest
from sidecast.nowcaster_service.session_settings import SessionSettings, check_scalars, settings_of
from sidecast.protos import nowcast_pb2 as pb


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
    check_scalars(request, manifest)
    options = _json_object("predictor_options_json", request.predictor_options_json)
    if request.HasField("push"):
        # The direction is the run's own average motion: no predictor is asked.
        return settings_of(request, manifest, options, 1)
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
    return settings_of(request, manifest, options, answer.max_horizon)


def _json_object(name: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise MalformedError(f"{name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise MalformedError(f"{name} is {value!r}; it must be a JSON object")
    return value
