"""Predictors by name: ours, and those that other packages declare as entry points."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from sidecast.errors import ConfigError
from sidecast.predictors.base import Predictor
from sidecast.predictors.option_types import check_option_types

ENTRY_POINT_GROUP = "sidecast.predictors"
"""A package of someone else's declares ``name = "module:factory"`` in this group. The factory takes its options as
keyword arguments, and the path of a weights file as ``weights`` if it needs one."""

_BUILT_IN = {
    "linear": "sidecast.predictors.linear:LinearPredictor",
    "average": "sidecast.predictors.average:AveragePredictor",
    "outer_nesterov": "sidecast.predictors.outer_nesterov:OuterNesterovPredictor",
    "rank1": "sidecast.predictors.rank1:Rank1Predictor",
    "wnn": "sidecast.predictors.wnn:create",
    "nino": "sidecast.predictors.nino.predictor:create",
    "wnn_plus": "sidecast.predictors.nino.predictor:create_wnn_plus",
    "nino_plain": "sidecast.predictors.nino.plain:create",
}


def predictor_names() -> list[str]:
    """Names that ``create_predictor`` knows, sorted."""
    return sorted(_factories())


def takes_option(name: str, option: str) -> bool:
    """Whether a predictor's factory takes an option (``weights`` is one); False for unknown names."""
    factory = _factories().get(name)
    return factory is not None and option in inspect.signature(factory.load()).parameters


def create_predictor(name: str, *, weights: Path | None = None, options: Mapping[str, Any] | None = None) -> Predictor:
    """Makes a predictor by name.

    Args:
        name: A built-in predictor, or one declared by an installed package.
        weights: Weights file, for predictors that are trained.
        options: Keyword arguments of the predictor's factory.

    Raises:
        ConfigError: Unknown name or option, an option of another type than its factory declares, or weights missing,
            unusable or not wanted.
    """
    factories = _factories()
    if name not in factories:
        raise ConfigError(f"predictor is {name!r}; allowed: {', '.join(sorted(factories))}")
    factory = factories[name].load()
    settings = dict(options or {})
    parameters = inspect.signature(factory).parameters
    allowed = [key for key, parameter in parameters.items() if parameter.kind is parameter.KEYWORD_ONLY]
    unknown = [key for key in settings if key not in allowed or key == "weights"]
    if unknown:
        choices = ", ".join(key for key in allowed if key != "weights") or "none"
        raise ConfigError(f"predictor {name!r} has no option {unknown[0]!r}; allowed: {choices}")
    check_option_types(name, factory, settings)
    if weights is not None:
        if "weights" not in allowed:
            raise ConfigError(f"predictor {name!r} takes no weights, but the weights file {weights} was given")
        settings["weights"] = weights
    elif "weights" in allowed and parameters["weights"].default is inspect.Parameter.empty:
        raise ConfigError(f"predictor {name!r} needs a weights file; none was given")
    predictor = factory(**settings)
    if not isinstance(predictor, Predictor):
        raise ConfigError(
            f"predictor {name!r}: {factories[name].value} made a {type(predictor).__name__}, no Predictor"
        )
    return predictor


def _factories() -> dict[str, EntryPoint]:
    known = {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}
    # Ours win: an installed package must not change what a documented name means.
    return known | {name: EntryPoint(name, value, ENTRY_POINT_GROUP) for name, value in _BUILT_IN.items()}
