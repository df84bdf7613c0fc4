"""Predictors are made by name, and wrong names, options and weights are refused in one clear line."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sidecast.errors import ConfigError
from sidecast.predictors import registry
from sidecast.predictors.base import History, Predictor
from sidecast.predictors.registry import create_predictor, predictor_names


class Foreign:
    """A predictor of someone else's package."""

    name = "foreign"
    context_len = None
    max_horizon = 1

    def __init__(self, *, strength: float = 1.0) -> None:
        self.strength = strength

    def predict(self, history: History, horizon_intervals: int, out: Tensor) -> None:
        out.fill_(self.strength)


def declare(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    point = EntryPoint(name, value, registry.ENTRY_POINT_GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [point])


def test_linear_needs_nothing() -> None:
    assert create_predictor("linear").name == "linear"


def test_published_weights_give_a_predictor(nino_data: Path) -> None:
    predictor = create_predictor(
        "nino_plain", weights=nino_data / "nino_no_posw.pt", options={"upd_scale": {"*norm*": 0.5}}
    )
    assert isinstance(predictor, Predictor)
    assert (predictor.context_len, predictor.max_horizon) == (5, 40)


def test_predictor_of_another_package(monkeypatch: pytest.MonkeyPatch) -> None:
    declare(monkeypatch, "foreign", f"{__name__}:Foreign")
    predictor = create_predictor("foreign", options={"strength": 3.0})
    assert isinstance(predictor, Foreign)
    assert predictor.strength == 3.0
    assert "foreign" in predictor_names()


def test_another_package_cannot_replace_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    declare(monkeypatch, "linear", f"{__name__}:Foreign")
    assert not isinstance(create_predictor("linear"), Foreign)


def test_factory_of_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    declare(monkeypatch, "foreign", "builtins:dict")
    monkeypatch.setattr(registry.inspect, "signature", lambda factory: registry.inspect.Signature())
    with pytest.raises(ConfigError, match="builtins:dict made a dict, no Predictor"):
        create_predictor("foreign")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "crystal_ball"}, r"predictor is 'crystal_ball'; allowed: .*linear.*nino"),
        ({"name": "linear", "options": {"slope": 2}}, r"'linear' has no option 'slope'"),
        ({"name": "linear", "weights": Path("w.pt")}, r"'linear' takes no weights.*w\.pt"),
        ({"name": "nino_plain"}, r"'nino_plain' needs a weights file"),
        ({"name": "nino_plain", "weights": Path("none.pt")}, r"none\.pt does not exist"),
        ({"name": "nino_plain", "options": {"weights": "w.pt"}}, r"no option 'weights'; allowed: layout, upd_scale"),
    ],
)
def test_refusals(arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        create_predictor(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("upd_scale", [-1.0, float("nan"), True, "1", {"*": -0.5}])
def test_bad_step_length(nino_data: Path, upd_scale: object) -> None:
    with pytest.raises(ConfigError, match="upd_scale"):
        create_predictor("nino_plain", weights=nino_data / "nino_no_posw.pt", options={"upd_scale": upd_scale})


def test_predictors_see_only_finite_histories() -> None:
    from sidecast.manifest import ModelManifest

    manifest = ModelManifest.from_shapes([("a", [2]), ("b", [3])])
    states = [torch.zeros(5), torch.ones(5)]
    states[0][3] = torch.inf
    with pytest.raises(ConfigError, match=r"'b' has NaN or infinite values"):
        create_predictor("linear").predict(History(manifest, states), 1, torch.empty(5))
