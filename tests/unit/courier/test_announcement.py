"""What rank 0 hands its courier reaches the service whole: no field needs a line of the courier's."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, get_type_hints

import pytest

from sidecast.protos import nowcast_pb2 as pb
from sidecast.trainer.courier.process import announcement
from sidecast.trainer.pipe.messages import HorizonSettings, Opening, PushSettings, Session
from tests.support.courier_harness import session, settings
from tests.support.services.harness import MANIFEST

# Values that are not what zero or nothing means on the wire, by the kind of a field.
NEW_VALUES: dict[Any, Any] = {str: "new", int: 77, float: 0.75, bool: True}


def renewed(message: Any) -> Any:
    """The message with other values in all its scalar fields."""
    hints = get_type_hints(type(message))
    return replace(message, **{name: NEW_VALUES[hint] for name, hint in hints.items() if hint in NEW_VALUES})


def sent(request: pb.OpenRequest, name: str) -> Any:
    """A field of the announcement, as a rank writes it."""
    if name == "parameters":
        return tuple((item.fqn, tuple(item.shape)) for item in request.manifest.parameters)
    if name == "horizon":
        return HorizonSettings(**{name: getattr(request.horizon, name) for name in get_type_hints(HorizonSettings)})
    if name == "push":
        return PushSettings(**{name: getattr(request.push, name) for name in get_type_hints(PushSettings)})
    if name == "read_outs":
        return tuple(request.read_outs)
    if name == "aliases":
        return dict(request.manifest.aliases)
    return getattr(request.manifest if name == "config_json" else request, name)


@pytest.fixture
def opening() -> Opening:
    made = settings("127.0.0.1:1", MANIFEST, []).opening
    assert made is not None
    push = PushSettings(time_constant_steps=50.0, gain=2.0, start_step=10, stop_step=1000, max_relative_norm=3.0)
    changed: Opening = renewed(replace(made, horizon=renewed(made.horizon), push=push, read_outs=("ema5",)))
    return changed


def test_every_field_of_an_opening_and_its_session_is_in_the_request(opening: Opening) -> None:
    begun: Session = replace(renewed(session("s1")), run_secret="a secret")
    request = announcement(replace(settings("127.0.0.1:1", MANIFEST, []), opening=opening), begun)
    for message in (opening, begun):
        for field in fields(message):
            if field.name == "run_secret":
                # It travels in the metadata of every call.
                assert message.run_secret.encode() not in request.SerializeToString()
                continue
            assert sent(request, field.name) == getattr(message, field.name), field.name
