"""Whatever a predictor's option is set to: it predicts with it, or one line says what is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from sidecast.manifest import ModelManifest
from sidecast.predictors.base import History
from sidecast.predictors.nino.config import NinoConfig
from sidecast.predictors.nino.weights import NinoWeights, save_weights
from sidecast.predictors.registry import create_predictor, predictor_names, takes_option
from sidecast.predictors.wnn import WnnConfig, WnnNetwork
from tests.support.refusals import one_line

OPTIONS = {
    "linear": (),
    "rank1": (),
    "average": ("decay",),
    "outer_nesterov": ("momentum",),
    "wnn": ("upd_scale", "device"),
    "wnn_plus": ("layout", "upd_scale", "device", "precision", "loops", "num_threads"),
    "nino": ("layout", "upd_scale", "device", "precision", "loops", "num_threads"),
    "nino_plain": ("layout", "upd_scale", "trimmed"),
}
PLAIN = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 3),
    st.sampled_from([10**400, -(10**400), 2**63, 0.5, -0.5, 1e300, float("nan"), float("inf"), -0.0]),
    st.sampled_from(
        [
            "",
            "x",
            "0.5",
            "official",
            "symmetric",
            "cpu",
            "cuda:99",
            "fp32",
            "bf16",
            "auto",
            "amx",
            "\x00",
            "\ud800",
            "a" * 999,
        ]
    ),
)
JSON = st.recursive(
    PLAIN,
    lambda inner: st.one_of(
        st.lists(inner, max_size=2), st.dictionaries(st.sampled_from(["*", "0.weight", "["]), inner, max_size=2)
    ),
    max_leaves=3,
)
HORIZONS = st.sampled_from([1, 2, 40, 0, -1, 10**6, 10**6 + 1, 2**63, 10**400])


@pytest.fixture(scope="module")
def weights_of(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Untrained weights of the predictors that need some."""
    folder = tmp_path_factory.mktemp("weights")
    files = {}
    for name, gnn in (("nino", True), ("wnn_plus", False)):
        config = NinoConfig(gnn=gnn, hidden_dim=4, max_horizon=2, lpe_dim=2)
        generator = torch.Generator().manual_seed(1)
        tensors = {key: torch.randn(shape, generator=generator) / 3 for key, shape in config.shapes().items()}
        files[name] = folder / f"{name}.safetensors"
        save_weights(files[name], NinoWeights(config, tensors, "memory"))
    torch.manual_seed(0)
    files["wnn"] = folder / "wnn.safetensors"
    save_file(WnnNetwork(WnnConfig(max_horizon=2, hidden_dim=4)).state_dict(), files["wnn"])
    return {**files, "nino_plain": files["nino"]}


def history() -> History:
    shapes = [("0.weight", (3, 2)), ("0.bias", (3,)), ("1.weight", (2, 3))]
    manifest = ModelManifest.from_shapes(shapes, {"model_type": "sequential"})
    generator = torch.Generator().manual_seed(2)
    return History(manifest, [torch.randn(manifest.num_elements, generator=generator) for _ in range(5)])


def test_every_option_is_tried() -> None:
    for name in OPTIONS:
        assert all(takes_option(name, option) for option in OPTIONS[name])
    assert set(OPTIONS) == set(predictor_names())


@pytest.mark.parametrize("name", OPTIONS)
@settings(derandomize=True, deadline=None, max_examples=80, database=None)
@given(data=st.data(), horizon=HORIZONS)
def test_any_option_and_horizon(weights_of: dict[str, Path], name: str, data: st.DataObject, horizon: int) -> None:
    options: dict[str, Any] = {}
    if OPTIONS[name]:
        options[data.draw(st.sampled_from(OPTIONS[name]))] = data.draw(JSON)
    states = history()
    out = torch.full((states.manifest.num_elements,), float("nan"))
    with one_line():
        create_predictor(name, weights=weights_of.get(name), options=options).predict(states, horizon, out)
        assert 1 <= horizon <= 10**6
        assert bool(out.isfinite().all()) or options
