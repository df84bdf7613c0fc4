"""From an announcement to settings: everything that can be wrong with a run is refused here, before its first step."""

from __future__ import annotations

import asyncio
import json
import math
import re
from typing import Any, Protocol

from sidecast.manifest import ModelManifest
from sidecast.nowcaster_service.errors import MalformedError
from sidecast.nowcaster_service.nowcasting import PredictorAnswer, PredictorRequest
from sidecast.nowcaster_service.session_settings import SessionSettings, check_scalars, settings_of
from sidecast.protos import nowcast_pb2 as pb

MAX_NAME_CHARACTERS = 128
MAX_DIMENSIONS = 32
# Of JSON; what is built of it is walked by calls that call themselves.
MAX_DEPTH = 64
SHOWN_CHARACTERS = 100
_NAME = re.compile(r"[A-Za-z0-9._-]{1,128}")


class PredictorChecks(Protocol):
    """Whoever knows whether a predictor can serve a model; does not wait for nowcasts that are being made."""

    async def check(self, request: PredictorRequest) -> PredictorAnswer: ...


async def admit(request: pb.OpenRequest, checks: PredictorChecks) -> SessionSettings:
    """The settings of a run that can be served.

    Raises:
        MalformedError: It can never be served as it is.
    """
    check_names(request)
    # In a thread: a model of a hundred thousand tensors takes its time, which is that of all runs.
    manifest = await asyncio.to_thread(_manifest_of, request)
    check_scalars(request, manifest)
    options = _json_object("predictor_options_json", request.predictor_options_json, are_finite=True)
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


def check_names(request: pb.OpenRequest) -> None:
    """Refuses names that would be another's line in a log, or another's label in the metrics.

    Raises:
        MalformedError: A name is too long, or holds other characters than are allowed.
    """
    for what, name in (("session_id", request.session_id), ("run_id", request.run_id)):
        if name and not _NAME.fullmatch(name):
            raise MalformedError(f"{what} is {_shortened(name)}; allowed: at most 128 letters, digits and . _ -")
    if len(request.predictor) > MAX_NAME_CHARACTERS or not (request.predictor.isprintable()):
        raise MalformedError(
            f"predictor is {_shortened(request.predictor)}; allowed: at most {MAX_NAME_CHARACTERS} printable characters"
        )
    for item in request.manifest.parameters:
        if not item.fqn.isprintable() or len(item.shape) > MAX_DIMENSIONS:
            raise MalformedError(
                f"parameter {_shortened(item.fqn)} has {len(item.shape)} dimensions; allowed: printable names, at most "
                f"{MAX_DIMENSIONS} dimensions"
            )


def _manifest_of(request: pb.OpenRequest) -> ModelManifest:
    manifest = ModelManifest.from_shapes(
        ((item.fqn, item.shape) for item in request.manifest.parameters),
        _json_object("manifest.config_json", request.manifest.config_json),
        dict(request.manifest.aliases),
    )
    # Computed here, and kept with the manifest.
    _ = manifest.schema_hash, manifest.num_elements
    return manifest


def _json_object(name: str, text: str, *, are_finite: bool = False) -> dict[str, Any]:
    """A JSON object that whoever is handed it can work with.

    Args:
        name: Of the field, for messages.
        text: Its JSON.
        are_finite: Whether all numbers must be: comparing with NaN would switch a check off.

    Raises:
        MalformedError: It is something else, nested deeper than ``MAX_DEPTH``, or has an integer beyond 64 bits.
    """
    try:
        value = json.loads(text or "{}")
    except RecursionError:
        raise MalformedError(f"{name} is nested deeper than is allowed: {MAX_DEPTH}") from None
    # Also an integer of thousands of digits.
    except ValueError as error:
        raise MalformedError(f"{name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise MalformedError(f"{name} is {_shortened(value)}; it must be a JSON object")
    left: list[tuple[Any, int]] = [(value, 1)]
    while left:
        item, depth = left.pop()
        if isinstance(item, dict | list):
            if depth > MAX_DEPTH:
                raise MalformedError(f"{name} is nested deeper than is allowed: {MAX_DEPTH}")
            left += ((inner, depth + 1) for inner in (item.values() if isinstance(item, dict) else item))
        elif isinstance(item, int) and not -(2**63) <= item < 2**64:
            raise MalformedError(f"{name} has an integer of {item.bit_length()} bits; allowed: 64")
        elif are_finite and isinstance(item, float) and not math.isfinite(item):
            raise MalformedError(f"{name} has the number {item}; allowed: finite ones")
    return value


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}... ({len(text)} characters)"
