"""Messages as bytes: all of them come back as they were, and nothing else is taken for one."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

from sidecast.trainer.pipe.encoding import MessageError, decode, encode
from sidecast.trainer.pipe.messages import (
    TO_COURIER,
    TO_HOOK,
    BeginSession,
    Committed,
    Report,
    Session,
    Snapshot,
    Stats,
    Totals,
)

KINDS: Mapping[str, Any] = {**TO_COURIER, **TO_HOOK}
SESSION = Session(session_id="s1", run_id="r1", resumed=True, resume_step=7, resume_epoch=2, run_secret="secret")


def example(hint: Any, *, is_full: bool) -> Any:
    """A value of a field's type; without what may be absent unless it is to be full."""
    origin, kinds = get_origin(hint), get_args(hint)
    if origin is UnionType:
        return example(kinds[0], is_full=is_full) if is_full else None
    if origin is Literal:
        return kinds[-1]
    if origin is tuple:
        each = kinds[:-1] * 2 if kinds[-1] is Ellipsis else kinds
        return tuple(example(kind, is_full=is_full) for kind in each)
    if origin is not None:
        return {"ä": "b"}
    if hint in (int, float, str, bool):
        return {int: 2**62 + 1, float: 0.1, str: "ß\n", bool: True}[hint]
    return hint(**{name: example(each, is_full=is_full) for name, each in get_type_hints(hint).items()})


@pytest.mark.parametrize("is_full", [True, False], ids=["full", "bare"])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_message_comes_back_as_it_was(kind: str, is_full: bool) -> None:
    message = example(KINDS[kind], is_full=is_full)
    assert decode(encode(message), KINDS) == message


def test_losses_that_are_not_finite_travel() -> None:
    stats = Stats(totals=Totals(), step=1, loss=math.nan, suspended=False, train_s=math.inf, num_courier_deaths=0)
    found = decode(encode(stats), TO_COURIER)
    assert isinstance(found, Stats)
    assert found.loss is not None
    assert (math.isnan(found.loss), found.train_s) == (True, math.inf)


def altered(message: Any, *path: str, **fields: Any) -> bytes:
    """An encoded message with other fields, in it or in one of its fields."""
    plain = json.loads(encode(message))
    inside = plain["fields"]
    for name in path:
        inside = inside[name]
    inside.update(fields)
    return json.dumps(plain, default=str).encode()


SNAPSHOT = Snapshot(slot=0, step=10, epoch=0)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"\xff", "is not a message"),
        (b"[1]", "is not a message"),
        (b'{"kind":"Snapshot"}', "is not a message"),
        (b'{"kind":"Greeting","fields":{}}', "of kind 'Greeting'; allowed: BeginSession, Hello, Log"),
        (encode(Committed(step=1)), "of kind 'Committed'; allowed: BeginSession"),
        (altered(SNAPSHOT, colour=1), "Snapshot has the fields slot, .*, colour; allowed: slot, step, epoch, "),
        (b'{"kind":"Snapshot","fields":{"slot":0}}', "Snapshot has the fields slot; allowed: slot, step, epoch"),
        (b'{"kind":"Snapshot","fields":[]}', r"Snapshot is \[\]; allowed: an object"),
        (altered(SNAPSHOT, slot="0"), "Snapshot.slot is '0'; allowed: int"),
        (altered(SNAPSHOT, slot=True), "Snapshot.slot is True; allowed: int"),
        (altered(SNAPSHOT, slot=None), "Snapshot.slot is None; allowed: int"),
        (
            altered(BeginSession(session=SESSION), "session", colour=1),
            "BeginSession.session has the fields .*colour; allowed: session_id",
        ),
        (
            altered(Report(outcome="applied", version=1, step=1, epoch=0), outcome="liked"),
            "Report.outcome is 'liked'; allowed: 'applied', 'accepted', 'rolled_back', 'rejected'",
        ),
    ],
)
def test_what_is_not_known_here_is_refused_by_name(body: bytes, reason: str) -> None:
    with pytest.raises(MessageError, match=reason):
        decode(body, TO_COURIER)


@pytest.mark.parametrize("shards", [[[0, 0]], [[0, 0, "1"]], 3])
def test_a_list_of_another_shape_is_refused(shards: Any) -> None:
    body = altered(example(KINDS["Hello"], is_full=True), "settings", upload_shards=shards)
    with pytest.raises(MessageError, match=r"Hello\.settings\.upload_shards is "):
        decode(body, TO_COURIER)


def test_a_message_of_either_way_is_of_one_kind() -> None:
    assert not TO_COURIER.keys() & TO_HOOK.keys()
