"""Trained predictors work without weights given where some are shipped, and never with others than those."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from sidecast.errors import ConfigError
from sidecast.metatraining.networks import initial_tensors
from sidecast.predictors import shipped
from sidecast.predictors.base import History
from sidecast.predictors.nino import predictor as nino_predictor
from sidecast.predictors.nino.config import NinoConfig
from sidecast.predictors.nino.weights import NinoWeights, load_weights, save_weights
from sidecast.predictors.registry import create_predictor
from sidecast.predictors.shipped import FOLDER, SHIPPED, ShippedFile, shipped_weights
from tests.support.farm_runs import TASK

MAX_BYTES = 5_000_000


def made(path: Path, layout: str | None) -> Path:
    """A network that predicts something."""
    config = NinoConfig(hidden_dim=16, max_horizon=3, max_kernel_elements=1)
    generator = torch.Generator().manual_seed(0)
    tensors = initial_tensors(config, generator)
    tensors["edge_out.fc.2.weight"].normal_(generator=generator)
    save_weights(path, NinoWeights(config, tensors, "memory", layout=layout))
    return path


def history() -> History:
    model = TASK.model.build()
    return History(model.manifest, [model.initial(0) * (1 + 0.01 * position) for position in range(5)])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the weights of `nino` lie, as if they were shipped."""
    content = made(tmp_path / "nino.safetensors", "symmetric").read_bytes()
    file = ShippedFile("nino.safetensors", hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(shipped, "SHIPPED", {"nino": file})
    monkeypatch.setattr(nino_predictor, "shipped_weights", lambda name: shipped_weights(name, tmp_path))
    return tmp_path


def test_no_weights_are_needed(folder: Path) -> None:
    predictor = create_predictor("nino")
    delta = torch.full_like(history().states[0], torch.nan)
    predictor.predict(history(), predictor.max_horizon, delta)
    assert delta.isfinite().all()
    assert delta.abs().max() > 0


def test_another_file_is_refused(folder: Path) -> None:
    path = folder / "nino.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"has the SHA-256 [0-9a-f]{64}; [0-9a-f]{64} was shipped: reinstall"):
        create_predictor("nino")
    path.unlink()
    with pytest.raises(ConfigError, match=r"'nino' was given no weights file, and its own, .*, is not installed"):
        create_predictor("nino")


def test_what_is_not_shipped_has_to_be_given(folder: Path) -> None:
    with pytest.raises(ConfigError, match="predictor 'wnn_plus' needs a weights file; none was given"):
        create_predictor("wnn_plus")


def test_given_weights_are_used_instead(folder: Path, tmp_path: Path) -> None:
    (folder / "nino.safetensors").unlink()
    assert create_predictor("nino", weights=made(tmp_path / "mine.safetensors", None)).name == "nino"


def test_what_is_shipped_predicts() -> None:
    for name in SHIPPED:
        predictor = create_predictor(name)
        delta = torch.full_like(history().states[0], torch.nan)
        predictor.predict(history(), predictor.max_horizon, delta)
        assert delta.isfinite().all()
        assert delta.abs().max() > 0


def test_what_is_shipped_is_small_and_all_of_it_is_known() -> None:
    files = sorted(FOLDER.iterdir()) if FOLDER.is_dir() else []
    assert {path.name for path in files} == {file.name for file in SHIPPED.values()}
    assert sum(path.stat().st_size for path in files) < MAX_BYTES


def test_a_file_says_its_layout(tmp_path: Path) -> None:
    path = made(tmp_path / "nino.safetensors", "symmetric")
    assert load_weights(path).layout == "symmetric"
    # A Llama has both, and `official` is the default of weights that say nothing.
    changes = {}
    silent = made(tmp_path / "silent.safetensors", None)
    for key, file, options in (
        ("said", path, {}),
        ("symmetric", silent, {"layout": "symmetric"}),
        ("official", path, {"layout": "official"}),
        ("silent", silent, {}),
    ):
        changes[key] = torch.empty_like(history().states[0])
        create_predictor("nino", weights=file, options=options).predict(history(), 1, changes[key])
    assert torch.equal(changes["said"], changes["symmetric"])
    assert torch.equal(changes["silent"], changes["official"])
    assert not torch.equal(changes["said"], changes["silent"])
    weights = load_weights(path)
    with pytest.raises(ConfigError, match="layout is 'round'; allowed: official, symmetric"):
        NinoWeights(weights.config, weights.tensors, "memory", layout="round")


def test_the_same_weights_are_the_same_file(tmp_path: Path) -> None:
    first, again = (made(tmp_path / name, "symmetric").read_bytes() for name in ("a.safetensors", "b.safetensors"))
    assert first == again
