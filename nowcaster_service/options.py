"""How a setting is given on the command line: declared beside it, read by the parser and by the documentation."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, fields, replace
from typing import Any

_KEY = "option"


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option of a command.

    Attributes:
        flag: With its dashes.
        help: What it is, without its default.
        kind: Makes a value of the text; what it raises, argparse answers.
        unit: How many of the setting's units (bytes) are one of the option's.
        read: Makes the setting's value of the option's.
        default: The default as people read it; empty for none.
        is_flag: Whether it is given without a value.
    """

    flag: str
    help: str
    kind: Callable[[str], Any] = str
    unit: int = 1
    read: Callable[[Any], Any] | None = None
    default: str = ""
    is_flag: bool = False

    @property
    def name(self) -> str:
        """Of the attribute of parsed arguments."""
        return self.flag.lstrip("-").replace("-", "_")

    def setting(self, given: Any) -> Any:
        """The setting's value.

        Args:
            given: What the parser made of the text; not None.

        Raises:
            ConfigError: It names a file that cannot be read.
        """
        if self.read is not None:
            return self.read(given)
        if self.unit == 1:
            return given
        # No number of bytes, which the settings then refuse.
        return int(given * self.unit) if math.isfinite(given) else 0


def option(flag: str, help: str, **how: Any) -> Mapping[str, Option]:
    """Metadata of a dataclass field that an option sets."""
    return {_KEY: Option(flag=flag, help=help, **how)}


def options_of(settings: Any) -> dict[str, Option]:
    """The options that set a dataclass's fields, by field, in their order and with their defaults."""
    return {
        item.name: replace(item.metadata[_KEY], default=_shown_default(item))
        for item in fields(settings)
        if _KEY in item.metadata
    }


def _shown_default(item: Field[Any]) -> str:
    declared: Option = item.metadata[_KEY]
    if declared.default or item.default is MISSING or item.default is None:
        return declared.default
    if declared.is_flag:
        return ""
    return f"{item.default / declared.unit:g}" if isinstance(item.default, int | float) else str(item.default)


def add_options(parser: argparse.ArgumentParser, options: Iterable[Option]) -> None:
    """Lets a parser take options; those that are not given are None."""
    for item in options:
        default = f" (default: {item.default})" if item.default else ""
        if item.is_flag:
            # None where it is not given, as with the others.
            parser.add_argument(item.flag, action="store_true", default=None, help=item.help)
            continue
        parser.add_argument(item.flag, type=item.kind, help=item.help + default)


def given_settings(settings: Any, args: argparse.Namespace) -> dict[str, Any]:
    """The values of the fields whose options were given."""
    given = {name: (item, getattr(args, item.name)) for name, item in options_of(settings).items()}
    return {name: item.setting(value) for name, (item, value) in given.items() if value is not None}
