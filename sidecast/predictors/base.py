"""What every predictor looks like to the service, to offline tools and to in-process users.

Shape suffixes: C context (states, newest last), P elements of the parameter vector, N elements of one tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from sidecast.errors import ConfigError, shown
from sidecast.manifest import ModelManifest

MAX_HORIZON_INTERVALS = 1_000_000


@dataclass(frozen=True)
class History:
    """C equally spaced states of one model, newest last, each a parameter vector.

    The vectors may be memory-mapped files or shared memory: predictors read them tensor by tensor or tile by
    tile and never copy a whole one.

    Attributes:
        manifest: Names, shapes and order of the parameters.
        states: C one-dimensional tensors of P elements; any floating dtype, computed with in fp32.
    """

    manifest: ModelManifest
    states: Sequence[Tensor]

    def __post_init__(self) -> None:
        for state in self.states:
            if state.shape != (self.manifest.num_elements,):
                raise ConfigError(
                    f"a state of the history has shape {tuple(state.shape)}; "
                    f"the manifest needs ({self.manifest.num_elements},)"
                )

    @property
    def context_len(self) -> int:
        return len(self.states)

    def tensor(self, fqn: str) -> list[Tensor]:
        """The C flat states of one parameter, as views (N elements each)."""
        start = self.manifest.offsets[fqn]
        stop = start + self.manifest.spec(fqn).numel
        return [state[start:stop] for state in self.states]


@runtime_checkable
class Predictor(Protocol):
    """Predicts where parameters will be some snapshot intervals after the newest state of a history.

    Stateless: everything that a prediction depends on is given to the constructor and to ``predict``, so that
    one predictor may serve many sessions at once.

    Attributes:
        name: What users call it in the configuration.
        context_len: C, the states that it needs; None if any number of at least two will do.
        max_horizon: Default first horizon of a run, in snapshot intervals.
    """

    @property
    def name(self) -> str: ...

    @property
    def context_len(self) -> int | None: ...

    @property
    def max_horizon(self) -> int: ...

    def predict(self, history: History, horizon_intervals: int, out: Tensor) -> None:
        """Writes the predicted change, prediction - newest state.

        Args:
            history: C states.
            horizon_intervals: k, how far ahead, in snapshot intervals.
            out: P elements, fp32, overwritten; may be a memory-mapped file.

        Raises:
            ConfigError: The history, model or horizon is not one that this predictor can work on.
        """
        ...


@runtime_checkable
class ModelPredictor(Protocol):
    """A predictor that depends on the model's architecture, as those on neural graphs do."""

    def prepare(self, manifest: ModelManifest) -> None:
        """Builds and keeps what depends on the model alone, so that the first nowcast is not slower.

        Raises:
            ConfigError: The model is not one that this predictor can work on.
        """
        ...


def check_context_len(predictor: Predictor, context_len: int, given: str | None = None) -> None:
    """Checks a number of states before there is a history.

    Args:
        predictor: That is to work on them.
        context_len: C, their number.
        given: How the message says what it is; ``context_len is C`` if None.

    Raises:
        ConfigError: The predictor cannot work on so many.
    """
    wanted = predictor.context_len
    is_allowed, needs = (
        (context_len >= 2, "at least 2") if wanted is None else (context_len == wanted, f"exactly {wanted}")
    )
    if not is_allowed:
        raise ConfigError(f"{given or f'context_len is {context_len}'}; predictor {predictor.name!r} needs {needs}")


def check_horizon(name: str, horizon_intervals: int, unit: str) -> None:
    """Raises ConfigError unless a horizon is one that predictors can count to.

    Args:
        name: What the message calls it.
        horizon_intervals: k.
        unit: What it is counted in, for the message.
    """
    if not 1 <= horizon_intervals <= MAX_HORIZON_INTERVALS:
        raise ConfigError(
            f"{name} is {shown(horizon_intervals)}; it must be at least 1 {unit} and at most {MAX_HORIZON_INTERVALS:,}"
        )


def check_history(predictor: Predictor, history: History, horizon_intervals: int) -> None:
    """Raises ConfigError unless the predictor can work on this history and horizon."""
    check_context_len(predictor, history.context_len)
    check_horizon("horizon", horizon_intervals, "snapshot interval")


def fp32_states(predictor: Predictor, history: History, fqn: str) -> Tensor:
    """The states of one parameter in fp32, (C, N).

    Raises:
        ConfigError: A value is not finite; predictions from such a history would be noise.
    """
    states_CN = torch.stack([state.to(torch.float32) for state in history.tensor(fqn)])
    if not states_CN.isfinite().all():
        raise non_finite(predictor.name, fqn)
    return states_CN


def non_finite(predictor: str, fqn: str) -> ConfigError:
    """The refusal of a history with NaN or infinite values."""
    return ConfigError(
        f"parameter {fqn!r} has NaN or infinite values in the history; predictor {predictor!r} needs finite ones"
    )
