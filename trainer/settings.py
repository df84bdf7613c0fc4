"""Reads settings: plain values, as a JSON file holds them, become frozen classes, or one sentence says what is allowed.

The only reader of the training side, and of the standard library alone: a way in that needs nothing but torch has
settings, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from sidecast.errors import ConfigError

Settings = TypeVar("Settings")

_KINDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", Mapping: "an object"}


def read_settings(kind: type[Settings], values: Any, section: str) -> Settings:
    """Builds a settings class from plain values.

    Args:
        kind: A dataclass whose fields are bool, int, float, str, ``Literal``, ``Mapping[str, Any]``,
            ``tuple[str, ...]``, optional ones of these, or settings themselves. Its ``__post_init__`` checks what a
            type does not say.
        values: The JSON object; a key that is missing leaves a field at its default.
        section: Its dotted name, for messages.

    Raises:
        ConfigError: An unknown key, or a value of the wrong kind or out of range, named with what is allowed.
    """
    assert is_dataclass(kind)
    require(section, values, isinstance(values, Mapping), "an object")
    names = [field.name for field in fields(kind)]
    for key in values:
        if key not in names:
            raise ConfigError(f"{section} has an unknown key {key!r}; allowed: {', '.join(sorted(names))}")
    hints = get_type_hints(kind)
    return kind(**{key: _read(hints[key], value, f"{section}.{key}") for key, value in values.items()})


def require(name: str, value: object, is_allowed: bool, allowed: str) -> None:
    """Refuses a setting, in the one form that a refusal has.

    Args:
        name: The setting's dotted name.
        value: What it is.
        is_allowed: Whether it may be that.
        allowed: What it may be.

    Raises:
        ConfigError: It may not.
    """
    if not is_allowed:
        raise ConfigError(f"{name} is {value!r}; allowed: {allowed}")


def _read(hint: Any, value: Any, name: str) -> Any:
    if is_dataclass(hint):
        return read_settings(hint, value, name)  # type: ignore[arg-type]
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if value is None and NoneType in options:
        return None
    (kind,) = (option for option in options if option is not NoneType)
    or_null = ", or null" if NoneType in options else ""
    if get_origin(kind) is Literal:
        require(name, value, value in get_args(kind), ", ".join(map(repr, get_args(kind))) + or_null)
        return value
    if get_origin(kind) is tuple:
        is_list = isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)
        require(name, value, is_list, "a list of texts" + or_null)
        return tuple(value)
    # bool is an int to Python, not to a user.
    is_bool = isinstance(value, bool)
    if kind is float and isinstance(value, int) and not is_bool:
        return float(value)
    kind = Mapping if get_origin(kind) is not None else kind
    require(name, value, isinstance(value, kind) and is_bool == (kind is bool), _KINDS[kind] + or_null)
    return value
