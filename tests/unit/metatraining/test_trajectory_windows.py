"""Windows and targets are those that a nowcaster is to learn: the mean of the states around a horizon."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sidecast.errors import ConfigError
from sidecast.metatraining.windows import ScaledWindow, Window, draw_window, future_range, num_horizons
from sidecast.scaling import tensor_scale
from tests.support.small_trajectories import SOURCE, drifting

MANIFEST = SOURCE.task.model.build().manifest


def test_the_target_is_centred_on_its_horizon() -> None:
    for spacing in (1, 2, 4):
        for horizon in (1, 3, 10):
            span = future_range(7, spacing, horizon)
            assert (span[0] + span[-1]) / 2 == 7 + horizon * spacing
            assert len(span) == horizon * spacing // 2 * 2 + 1
            assert span[0] > 7


def test_states_are_equally_spaced_and_end_with_the_newest() -> None:
    trajectory = drifting()
    states = Window(trajectory, 12, 2).states(5)
    assert torch.equal(torch.stack(states), trajectory.states_NP[4:13:2].float())


def test_targets_of_straight_lines() -> None:
    trajectory = drifting()
    scaled = ScaledWindow(Window(trajectory, 8, 2), MANIFEST, 5)
    elements = torch.arange(0, MANIFEST.num_elements, 7)
    rows = torch.cat([torch.full((spec.numel,), row) for row, spec in enumerate(MANIFEST.parameters)])[elements]
    targets = scaled.targets(elements, rows, 3)
    slope = (trajectory.states_NP[1] - trajectory.states_NP[0])[elements].float()
    expected = slope[:, None] * 2 * torch.tensor([1.0, 2.0, 3.0]) * scaled.inverse_Q[rows, None]
    torch.testing.assert_close(targets, expected, rtol=1e-5, atol=1e-6)


def test_targets_average_noise_away() -> None:
    quiet, noisy = drifting(), drifting(noise=0.1)
    elements, rows = torch.arange(MANIFEST.num_elements), torch.zeros(MANIFEST.num_elements, dtype=torch.int64)
    targets = ScaledWindow(Window(noisy, 5, 1), MANIFEST, 5).targets(elements, rows, 10)
    newest = (noisy.states_NP[5] - quiet.states_NP[5]).float()
    inverse = ScaledWindow(Window(noisy, 5, 1), MANIFEST, 5).inverse_Q[0]
    slope = (quiet.states_NP[1] - quiet.states_NP[0]).float()
    # What is left besides the way and the noise of the newest state.
    rests = (targets / inverse + newest[:, None] - slope[:, None] * torch.arange(1, 11)).std(0)
    assert 0.08 < rests[0] < 0.12
    assert rests[9] < 0.04


def test_scales_are_the_predictors() -> None:
    window = Window(drifting(noise=0.1), 9, 1)
    scaled = ScaledWindow(window, MANIFEST, 5)
    history = window.history(MANIFEST, 5)
    for row, spec in enumerate(MANIFEST.parameters):
        scale = tensor_scale(history.tensor(spec.fqn))
        start = MANIFEST.offsets[spec.fqn]
        elements = torch.arange(start, start + spec.numel)
        part = scaled.states(elements, torch.full((spec.numel,), row))
        torch.testing.assert_close(part[:, 2], scale.scaled(history.tensor(spec.fqn)[2]), rtol=1e-6, atol=1e-6)
        assert scaled.inverse_Q[row] == pytest.approx(scale.inverse)


def test_horizons_beyond_the_end_have_no_target() -> None:
    trajectory = drifting()
    assert len(trajectory.states_NP) == 21
    assert num_horizons(Window(trajectory, 6, 1), 10) == 9
    assert num_horizons(Window(trajectory, 5, 1), 10) == 10
    assert num_horizons(Window(trajectory, 20, 1), 10) == 0


def test_drawn_windows_fill_the_trajectory_and_stay_inside() -> None:
    generator = torch.Generator().manual_seed(0)
    trajectory = drifting()
    windows = [draw_window([trajectory], (1, 2), 5, 3, generator) for _ in range(300)]
    oldest = {window.newest - 4 * window.spacing for window in windows}
    assert min(oldest) == 3
    for spacing in (1, 2):
        newest = [window.newest for window in windows if window.spacing == spacing]
        assert max(newest) == 20 - future_range(0, spacing, 1)[-1]
        assert all(num_horizons(Window(trajectory, each, spacing), 10) >= 1 for each in newest)


def test_a_trajectory_that_is_too_short_is_refused() -> None:
    trajectory = replace(drifting(), states_NP=drifting().states_NP[:6])
    with pytest.raises(ConfigError, match=r"have 6 snapshots; windows of 5 states 1 apart need at least 7"):
        draw_window([trajectory], (1,), 5, 1, torch.Generator())
