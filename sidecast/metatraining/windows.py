"""What a nowcaster learns from: a window of a trajectory, and the averages of the states that came after it.

Shape suffixes: C context, K horizons, N snapshots, P elements of the parameter vector, E edges, Q parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sidecast.errors import ConfigError
from sidecast.manifest import ModelManifest
from sidecast.metatraining.trajectories import Trajectory
from sidecast.predictors.base import History
from sidecast.scaling import tensor_scale


@dataclass(frozen=True)
class Window:
    """C equally spaced states of a trajectory.

    Attributes:
        trajectory: The run.
        newest: Number of the newest snapshot.
        spacing: Snapshots between two states: the interval that horizons count in.
    """

    trajectory: Trajectory
    newest: int
    spacing: int

    def states(self, context_len: int) -> list[Tensor]:
        """The states (P,) in fp32, newest last."""
        first = self.newest - (context_len - 1) * self.spacing
        return [self.trajectory.states_NP[index].float() for index in range(first, self.newest + 1, self.spacing)]

    def history(self, manifest: ModelManifest, context_len: int) -> History:
        """What a predictor is given."""
        return History(manifest, self.states(context_len))


def future_range(newest: int, spacing: int, horizon_intervals: int) -> range:
    """Snapshots whose mean is the target at a horizon of k intervals: from k / 2 to 3 k / 2 of them ahead, rounded.

    A state by itself is mostly noise of the optimizer, which nobody can predict; the wider the mean, the further
    ahead it is.
    """
    centre = newest + horizon_intervals * spacing
    half = horizon_intervals * spacing // 2
    return range(centre - half, centre + half + 1)


def num_horizons(window: Window, max_horizon: int) -> int:
    """Horizons whose targets lie inside the trajectory: all of 1 to this number."""
    last = len(window.trajectory.states_NP) - 1
    fitting = [
        horizon
        for horizon in range(1, max_horizon + 1)
        if future_range(window.newest, window.spacing, horizon)[-1] <= last
    ]
    return len(fitting)


def draw_window(
    trajectories: Sequence[Trajectory],
    spacings: Sequence[int],
    context_len: int,
    first_snapshot: int,
    generator: torch.Generator,
) -> Window:
    """A random window that has at least the shortest horizon's target.

    Args:
        trajectories: To choose from.
        spacings: To choose from.
        context_len: C.
        first_snapshot: Oldest snapshot that a window may begin with.
        generator: Decides.

    Raises:
        ConfigError: The trajectory that was chosen is too short for the spacing that was chosen.
    """
    trajectory = trajectories[_below(len(trajectories), generator)]
    spacing = spacings[_below(len(spacings), generator)]
    lowest = first_snapshot + (context_len - 1) * spacing
    highest = len(trajectory.states_NP) - 1 - (future_range(0, spacing, 1)[-1])
    if highest < lowest:
        raise ConfigError(
            f"the runs of {trajectory.source.name} have {len(trajectory.states_NP)} snapshots; windows of "
            f"{context_len} states {spacing} apart need at least {lowest + len(trajectory.states_NP) - highest}"
        )
    return Window(trajectory, lowest + _below(highest - lowest + 1, generator), spacing)


def _below(limit: int, generator: torch.Generator) -> int:
    return int(torch.randint(limit, (), generator=generator))


class ScaledWindow:
    """A window in the space in which nowcasters see it: scaled tensor by tensor over all its states.

    Args:
        window: The window.
        manifest: Of the model.
        context_len: C.

    Attributes:
        inverse_Q: What a centred value of each parameter tensor is multiplied with.
    """

    def __init__(self, window: Window, manifest: ModelManifest, context_len: int) -> None:
        self._window = window
        self._history = window.history(manifest, context_len)
        scales = [tensor_scale(self._history.tensor(spec.fqn)) for spec in manifest.parameters]
        self._mean_Q = torch.tensor([scale.mean for scale in scales])
        self.inverse_Q = torch.tensor([scale.inverse for scale in scales])

    def states(self, element_E: Tensor, row_E: Tensor) -> Tensor:
        """Scaled states of some elements, (E, C).

        Args:
            element_E: Elements of the parameter vector.
            row_E: Number of the parameter tensor of each.
        """
        states_EC = torch.stack([state[element_E] for state in self._history.states], dim=1)
        return (states_EC - self._mean_Q[row_E, None]) * self.inverse_Q[row_E, None]

    def targets(self, element_E: Tensor, row_E: Tensor, horizons: int) -> Tensor:
        """The scaled changes from the newest state to the mean of the states around each horizon, (E, K).

        Args:
            element_E: Elements of the parameter vector.
            row_E: Number of the parameter tensor of each.
            horizons: K, at most ``num_horizons``.
        """
        newest, spacing = self._window.newest, self._window.spacing
        stop = future_range(newest, spacing, horizons).stop
        future_NE = self._window.trajectory.states_NP[newest + 1 : stop][:, element_E].float()
        # Relative to the newest state, so that sums are of small numbers.
        future_NE -= self._window.trajectory.states_NP[newest][element_E].float()
        sums_NE = torch.cat([torch.zeros(1, len(element_E)), future_NE.cumsum(0)])
        changes = []
        for horizon in range(1, horizons + 1):
            span = future_range(newest, spacing, horizon)
            before, after = span.start - newest - 1, span.stop - newest - 1
            changes.append((sums_NE[after] - sums_NE[before]) / len(span))
        return torch.stack(changes, dim=1) * self.inverse_Q[row_E, None]
