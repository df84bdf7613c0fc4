"""Messages as bytes: a JSON object with the name of their kind and their fields.

Both ends are of one installation, but not always of one age: a courier that is started while its package is being
upgraded may be newer than its rank. So nothing is guessed: what is not known on this side is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from sidecast.errors import SidecastError
from sidecast.trainer.pipe.messages import ToCourier, ToHook

M = TypeVar("M")


class MessageError(SidecastError):
    """The other side sent what this side does not know."""


def encode(message: ToCourier | ToHook) -> bytes:
    """A message as bytes."""
    kind = type(message).__name__
    return json.dumps({"kind": kind, "fields": message}, default=_fields, separators=(",", ":")).encode()


def decode(body: bytes | bytearray, kinds: Mapping[str, type[M]]) -> M:
    """The message that ``encode`` made these bytes of.

    Args:
        body: All of the message and nothing else.
        kinds: What may arrive here, by name: ``TO_COURIER`` or ``TO_HOOK``.

    Raises:
        MessageError: It is of another kind, lacks a field, or has an unknown field or a value of another type.
    """
    try:
        message = json.loads(body)
        kind, values = str(message["kind"]), message["fields"]
    except (ValueError, TypeError, KeyError) as error:
        raise MessageError(f"{bytes(body[:80])!r} is not a message") from error
    if kind not in kinds:
        raise MessageError(f"a message is of kind {kind!r}; allowed: {', '.join(sorted(kinds))}")
    read: M = _read(kinds[kind], values, kind)
    return read


def _fields(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in fields(value)}


_hints = cache(get_type_hints)


def _read(hint: Any, value: Any, path: str) -> Any:
    if get_origin(hint) is UnionType:
        if value is None:
            return None
        hint = get_args(hint)[0]
    if is_dataclass(hint):
        hints: dict[str, Any] = _hints(hint)  # type: ignore[arg-type]
        _require(isinstance(value, dict), value, path, "an object")
        if value.keys() != hints.keys():
            raise MessageError(f"{path} has the fields {', '.join(value)}; allowed: {', '.join(hints)}")
        return hint(**{name: _read(hints[name], item, f"{path}.{name}") for name, item in value.items()})  # type: ignore[operator]
    if get_origin(hint) is tuple:
        kinds = get_args(hint)
        _require(isinstance(value, list), value, path, "a list")
        if kinds[-1] is Ellipsis:
            kinds = len(value) * kinds[:1]
        _require(len(value) == len(kinds), value, path, f"{len(kinds)} values")
        return tuple(_read(kind, item, path) for kind, item in zip(kinds, value, strict=True))
    if get_origin(hint) is Literal:
        _require(value in get_args(hint), value, path, ", ".join(map(repr, get_args(hint))))
        return value
    if hint is float and type(value) is int:
        return float(value)
    kind = dict if get_origin(hint) is not None else hint
    _require(type(value) is kind, value, path, kind.__name__)
    return value


def _require(is_met: bool, value: Any, path: str, allowed: str) -> None:
    if not is_met:
        raise MessageError(f"{path} is {value!r}; allowed: {allowed}")
