"""Where a callback's settings come from."""

from __future__ import annotations

from typing import Any

from sidecast.errors import ConfigError
from sidecast.trainer.hook.start import is_disabled


def choose_settings(callback: object, given: Any, of_engine: Any) -> Any:
    """The settings that a callback was given, or those of its engine's configuration; unchecked, None if disabled.

    Args:
        callback: For messages.
        given: To its constructor; None for nothing.
        of_engine: The ``"nowcaster"`` section of the ds_config; None without one.

    Raises:
        ConfigError: There are none, or both.
    """
    name = type(callback).__name__
    if given is not None and of_engine is not None:
        raise ConfigError(
            f"{name} was given settings, and the ds_config has a 'nowcaster' section; allowed: one of them"
        )
    if given is None and of_engine is None:
        raise ConfigError(
            f"{name} has no settings; pass a dictionary with those of the 'nowcaster' section, or have that section in "
            "the ds_config"
        )
    chosen = given if of_engine is None else of_engine
    return None if is_disabled(chosen) else chosen
