"""Closed-form predictors on histories whose future is known."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sidecast.errors import ConfigError
from sidecast.manifest import ModelManifest
from sidecast.predictors import tensor_parts
from sidecast.predictors.base import History, Predictor, check_context_len
from sidecast.predictors.registry import create_predictor
from sidecast.predictors.wnn import WnnConfig, WnnNetwork

MANIFEST = ModelManifest.from_shapes([("matrix", [4, 3]), ("vector", [5]), ("kernel", [2, 2, 3, 3])])
P = MANIFEST.num_elements
CLOSED_FORM = ["linear", "average", "outer_nesterov", "rank1"]


def noise(seed: int) -> Tensor:
    return torch.randn(P, generator=torch.Generator().manual_seed(seed))


def straight(context_len: int = 5) -> History:
    start, step = noise(0), noise(1)
    return History(MANIFEST, [start + step * position for position in range(context_len)])


def wandering(context_len: int = 5) -> History:
    return History(MANIFEST, [noise(seed) for seed in range(context_len)])


def delta(predictor: Predictor, history: History, horizon: int) -> Tensor:
    out = torch.full((history.manifest.num_elements,), torch.nan)
    predictor.predict(history, horizon, out)
    return out


@pytest.mark.parametrize("name", ["linear", "rank1"])
@pytest.mark.parametrize("context_len", [2, 5])
def test_lines_go_on(name: str, context_len: int) -> None:
    found = delta(create_predictor(name), straight(context_len), 7)
    torch.testing.assert_close(found, 7 * noise(1), rtol=1e-4, atol=1e-4)


def test_linear_fits_by_least_squares() -> None:
    history = wandering()
    design = torch.stack([torch.ones(5), torch.arange(5.0)], dim=1)
    slope = torch.linalg.lstsq(design, torch.stack(list(history.states))).solution[1]
    torch.testing.assert_close(delta(create_predictor("linear"), history, 3), 3 * slope, rtol=1e-4, atol=1e-5)


def test_rank1_drops_what_is_not_shared() -> None:
    history = wandering()
    found = delta(create_predictor("rank1"), history, 2)
    start = MANIFEST.offsets["kernel"]
    states = torch.stack(history.tensor("kernel")).double()
    left, singular, right = torch.linalg.svd(states - states.mean(0), full_matrices=False)
    coordinates = left[:, 0] * singular[0]
    times = torch.arange(5.0).double() - 2
    expected = 2 * (times @ coordinates) / times.square().sum() * right[0]
    torch.testing.assert_close(found[start:].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("decay", "weights"), [(1.0, [0.2] * 5), (0.5, [1 / 31, 2 / 31, 4 / 31, 8 / 31, 16 / 31])])
def test_average(decay: float, weights: list[float]) -> None:
    history = wandering()
    found = delta(create_predictor("average", options={"decay": decay}), history, 9)
    expected = sum(weight * state for weight, state in zip(weights, history.states, strict=True))
    torch.testing.assert_close(found + history.states[-1], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("horizon", [1, 3])
def test_outer_nesterov_is_momentum_running_on(horizon: int) -> None:
    history = wandering()
    momentum, expected = torch.zeros(P), torch.zeros(P)
    for before, after in zip(history.states, history.states[1:], strict=False):
        momentum = 0.9 * momentum + (after - before)
    for _ in range(horizon):
        momentum = 0.9 * momentum
        expected += momentum
    found = delta(create_predictor("outer_nesterov", options={"momentum": 0.9}), history, horizon)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CLOSED_FORM)
def test_pieces_do_not_change_the_result(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = delta(create_predictor(name), wandering(), 2)
    monkeypatch.setattr(tensor_parts, "MAX_ELEMENTS", 7)
    torch.testing.assert_close(delta(create_predictor(name), wandering(), 2), whole)


@pytest.mark.parametrize("name", CLOSED_FORM)
def test_constant_histories_stay(name: str) -> None:
    history = History(MANIFEST, [noise(0)] * 5)
    assert torch.equal(delta(create_predictor(name), history, 4), torch.zeros(P))


@pytest.mark.parametrize("name", CLOSED_FORM)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_computed_in_fp32(name: str, dtype: torch.dtype) -> None:
    rounded = [state.to(dtype) for state in wandering().states]
    found = delta(create_predictor(name), History(MANIFEST, rounded), 2)
    expected = delta(create_predictor(name), History(MANIFEST, [state.float() for state in rounded]), 2)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", CLOSED_FORM)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("position", [0, 4])
def test_non_finite_histories_are_refused(name: str, bad: float, position: int) -> None:
    history = wandering()
    history.states[position][13] = bad
    with pytest.raises(ConfigError, match="'vector' has NaN or infinite values"):
        delta(create_predictor(name), history, 2)


@pytest.mark.parametrize("name", CLOSED_FORM)
def test_empty_and_single_elements(name: str) -> None:
    manifest = ModelManifest.from_shapes([("empty", [0, 3]), ("single", [1])])
    history = History(manifest, [torch.tensor([float(position)]) for position in range(5)])
    assert delta(create_predictor(name), history, 1).isfinite().all()


@pytest.mark.parametrize(
    ("name", "options"),
    [("average", {"decay": 0.0}), ("average", {"decay": 1.5}), ("outer_nesterov", {"momentum": 1.0})],
)
def test_bad_options(name: str, options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        create_predictor(name, options=options)


@pytest.mark.parametrize("name", CLOSED_FORM)
@pytest.mark.parametrize(("context_len", "horizon"), [(1, 1), (5, 0)])
def test_bad_history_or_horizon(name: str, context_len: int, horizon: int) -> None:
    with pytest.raises(ConfigError):
        delta(create_predictor(name), wandering(context_len), horizon)


@pytest.fixture
def wnn_path(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "wnn.safetensors"
    save_file(WnnNetwork(WnnConfig(context_len=4, max_horizon=6, hidden_dim=8)).state_dict(), path)
    return path


def test_wnn_is_its_network_in_scaled_space(wnn_path: Path) -> None:
    predictor = create_predictor("wnn", weights=wnn_path)
    assert (predictor.context_len, predictor.max_horizon) == (4, 6)
    history = wandering(4)
    found = delta(predictor, history, 3)
    torch.manual_seed(0)
    network = WnnNetwork(WnnConfig(context_len=4, max_horizon=6, hidden_dim=8))
    for spec, operation in zip(MANIFEST.parameters, ["linear", "bias", "conv"], strict=True):
        states = torch.stack(history.tensor(spec.fqn), dim=-1)
        std = states.std()
        change = network(operation, (states - states.mean()) / (std + 1e-6))[:, 2] * std
        start = MANIFEST.offsets[spec.fqn]
        torch.testing.assert_close(found[start : start + spec.numel], change, rtol=1e-4, atol=1e-5)


def test_wnn_step_length_by_name(wnn_path: Path) -> None:
    half = create_predictor("wnn", weights=wnn_path, options={"upd_scale": {"vec*": 0.0, "*": 0.5}})
    whole = delta(create_predictor("wnn", weights=wnn_path), wandering(4), 3)
    found = delta(half, wandering(4), 3)
    torch.testing.assert_close(found[:12], whole[:12] / 2, rtol=1e-3, atol=2e-6)
    assert found[12:17].abs().max() < 1e-5


def test_wnn_on_histories_with_nothing_to_learn_from(wnn_path: Path) -> None:
    predictor = create_predictor("wnn", weights=wnn_path)
    assert torch.equal(delta(predictor, History(MANIFEST, [noise(0)[:1].expand(P)] * 4), 3), torch.zeros(P))
    manifest = ModelManifest.from_shapes([("empty", [0, 3]), ("single", [1])])
    still = History(manifest, [torch.tensor([1234.567])] * 4)
    assert torch.equal(delta(predictor, still, 1), torch.zeros(1))
    moving = History(manifest, [torch.tensor([float(position)]) for position in range(4)])
    assert delta(predictor, moving, 1).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_wnn_computes_in_fp32(wnn_path: Path, dtype: torch.dtype) -> None:
    predictor = create_predictor("wnn", weights=wnn_path)
    rounded = [state.to(dtype) for state in wandering(4).states]
    expected = delta(predictor, History(MANIFEST, [state.float() for state in rounded]), 2)
    torch.testing.assert_close(delta(predictor, History(MANIFEST, rounded), 2), expected)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_wnn_refuses_non_finite_histories(wnn_path: Path, bad: float) -> None:
    history = wandering(4)
    history.states[2][13] = bad
    with pytest.raises(ConfigError, match="parameter 'vector' has NaN or infinite values"):
        delta(create_predictor("wnn", weights=wnn_path), history, 2)


def test_huge_finite_values_are_not_called_infinite() -> None:
    history = History(MANIFEST, [torch.full((P,), value) for value in (-3e38, 0.0, 3e38)])
    delta(create_predictor("average"), history, 1)


def test_wnn_refuses_other_weights_and_horizons(wnn_path: Path, nino_data: Path) -> None:
    with pytest.raises(ConfigError, match=r"nino_mlp\.pt is no WNN.*edge_mlp"):
        create_predictor("wnn", weights=nino_data / "nino_mlp.pt")
    with pytest.raises(ConfigError, match=r"horizon is 7.*1 to 6"):
        delta(create_predictor("wnn", weights=wnn_path), wandering(4), 7)


@pytest.mark.parametrize(
    ("wanted", "context_len", "needs"),
    [(None, 1, "at least 2"), (None, 2, ""), (None, 9, ""), (5, 4, "exactly 5"), (5, 5, ""), (5, 6, "exactly 5")],
)
def test_a_number_of_states_that_will_not_do_is_one_line(wanted: int | None, context_len: int, needs: str) -> None:
    predictor: Any = SimpleNamespace(name="x", context_len=wanted)
    allowed = contextlib.nullcontext()
    with (
        pytest.raises(ConfigError, match=f"^context_len is {context_len}; .* 'x' needs {needs}$") if needs else allowed
    ):
        check_context_len(predictor, context_len)
    with pytest.raises(ConfigError, match=f"^few given; predictor 'x' needs {needs}$") if needs else allowed:
        check_context_len(predictor, context_len, "few given")
