"""Whether the options that a user gives a predictor are of the types that its factory declares."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any, Union, get_args, get_origin, get_type_hints

from sidecast.errors import ConfigError, shown

_WORDS = {float: "a number", int: "an integer", bool: "true or false", str: "a string", type(None): "null"}


def check_option_types(name: str, factory: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Checks options, which come from JSON or a command line, before a factory computes with them.

    Types other than numbers, truth values, strings, null, mappings to such and unions of such are left to the factory.

    Args:
        name: The predictor's, for messages.
        factory: Declares a type for each option that it takes.
        options: By name.

    Raises:
        ConfigError: An option is of another type than declared, or a number that is too large for a float.
    """
    try:
        # A class declares on its own what its instances have.
        declared = get_type_hints(getattr(factory, "__init__") if isinstance(factory, type) else factory)  # noqa: B009
    except (NameError, TypeError, AttributeError):
        # Declared under names that only type checkers see.
        return
    for key, value in options.items():
        if key in declared and not _fits(value, declared[key]):
            raise ConfigError(
                f"option {key!r} of predictor {name!r} is {shown(value)}; {_words(declared[key])} is needed"
            )


def _fits(value: object, declared: Any) -> bool:
    origin = get_origin(declared)
    if origin in (Union, types.UnionType):
        return any(_fits(value, choice) for choice in get_args(declared))
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        of_keys, of_values = get_args(declared) or (Any, Any)
        return isinstance(value, Mapping) and all(
            _fits(key, of_keys) and _fits(entry, of_values) for key, entry in value.items()
        )
    if declared is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and _is_in_range(value)
    if declared is int:
        return isinstance(value, int) and not isinstance(value, bool) and _is_in_range(value)
    if declared in _WORDS:
        return isinstance(value, declared)
    return True


def _is_in_range(value: float) -> bool:
    try:
        float(value)
    except OverflowError:
        return False
    return True


def _words(declared: Any) -> str:
    origin = get_origin(declared)
    if origin in (Union, types.UnionType):
        return " or ".join(_words(choice) for choice in get_args(declared))
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        return (
            f"an object of {_words(get_args(declared)[1]).removeprefix('a ')}s" if get_args(declared) else "an object"
        )
    return _WORDS.get(declared, str(declared))
