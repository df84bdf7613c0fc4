"""What is done to a run besides its optimizer's steps: nothing, pushes, jumps, an outer optimizer.

Shape suffix: P elements of the parameter vector.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor

from sidecast.errors import ConfigError
from sidecast.evaluation.methods.jump import JumpMethod
from sidecast.evaluation.methods.outer_nesterov import OuterNesterov
from sidecast.evaluation.methods.predicted_push import PredictedPushMethod
from sidecast.evaluation.methods.push import PushMethod
from sidecast.evaluation.settings import MethodSettings
from sidecast.manifest import ModelManifest


class Method(Protocol):
    """Looks at one member after every step, and may change its weights."""

    def after_step(self, step: int, params_P: Tensor, lr: float, loss: float) -> None:
        """Called once a step.

        Args:
            step: Steps taken, this one included.
            params_P: The weights, to be changed in place.
            lr: The learning rate of the step.
            loss: The training loss of the step.
        """
        ...

    def report(self) -> dict[str, float | int | str]:
        """What it did, for the result."""
        ...

    def state(self) -> dict[str, Any]:
        """Tensors and plain values for a checkpoint."""
        ...

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on from what ``state`` gave."""
        ...


class NoMethod:
    """Leaves a run alone."""

    def __init__(self, manifest: ModelManifest, params_P: Tensor) -> None:
        pass

    def after_step(self, step: int, params_P: Tensor, lr: float, loss: float) -> None:
        """See ``Method.after_step``."""

    def report(self) -> dict[str, float | int | str]:
        """See ``Method.report``."""
        return {}

    def state(self) -> dict[str, Any]:
        """See ``Method.state``."""
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        """See ``Method.load``."""


METHODS: Mapping[str, Callable[..., Method]] = {
    "none": NoMethod,
    "push": PushMethod,
    "predicted-push": PredictedPushMethod,
    "jump": JumpMethod,
    "outer-nesterov": OuterNesterov,
}


def with_defaults(settings: MethodSettings) -> MethodSettings:
    """The same settings with all options written out, so that a changed default does not change what results mean.

    Raises:
        ConfigError: There is no method of that name, or it does not know an option.
    """
    if settings.name not in METHODS:
        raise ConfigError(f"method is {settings.name!r}; allowed: {', '.join(METHODS)}")
    parameters = inspect.signature(METHODS[settings.name]).parameters.values()
    defaults = {each.name: each.default for each in parameters if each.kind is each.KEYWORD_ONLY}
    for option in settings.options:
        if option not in defaults:
            raise ConfigError(
                f"method {settings.name!r} has no option {option!r}; allowed: {', '.join(defaults) or 'none'}"
            )
    return MethodSettings(name=settings.name, options={**defaults, **settings.options})


def make_method(settings: MethodSettings, manifest: ModelManifest, params_P: Tensor) -> Method:
    """The method of one member.

    Raises:
        ConfigError: See ``with_defaults``; or the method does not allow an option's value.
    """
    options = with_defaults(settings).options
    try:
        return METHODS[settings.name](manifest, params_P, **options)
    except TypeError as error:
        raise ConfigError(f"method {settings.name!r} refuses the options {dict(settings.options)}: {error}") from error
