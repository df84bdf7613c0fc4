"""Weights load without executing anything, and wrong files are refused in one clear line."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sidecast.errors import ConfigError
from sidecast.predictors.nino.config import NinoConfig
from sidecast.predictors.nino.weights import NinoWeights, load_weights, save_weights

SMALL = NinoConfig(hidden_dim=6, max_horizon=7, max_kernel_elements=4, lpe_dim=3, num_layers=2)
SMALL_MLP = NinoConfig(gnn=False, hidden_dim=6, max_horizon=7, num_mlp_layers=3)


def tensors_of(config: NinoConfig) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in config.shapes().items()}


@pytest.mark.parametrize("config", [SMALL, SMALL_MLP])
def test_our_own_files_keep_hyper_parameters_and_tensors(config: NinoConfig, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    weights = NinoWeights(config, tensors_of(config), "memory")
    save_weights(path, weights)
    loaded = load_weights(path)
    assert loaded.config == config
    assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in weights.tensors.items())


@pytest.mark.parametrize("config", [SMALL, SMALL_MLP])
@pytest.mark.parametrize("nested", [True, False])
def test_hyper_parameters_of_published_files_follow_from_shapes(
    config: NinoConfig, nested: bool, tmp_path: Path
) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"state_dict": tensors_of(config), "model_args": {}} if nested else tensors_of(config), path)
    assert load_weights(path).config == config


def test_all_published_files_load(nino_data: Path) -> None:
    assert load_weights(nino_data / "nino_no_posw.pt").config == NinoConfig()
    assert load_weights(nino_data / "nino_mlp.pt").config == NinoConfig(gnn=False)
    assert load_weights(nino_data / "nino_mlp_h32.pt").config == NinoConfig(gnn=False, hidden_dim=32)


def refused(path: Path, *parts: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_weights(path)
    message = str(caught.value)
    assert "\n" not in message
    for part in (path.name, *parts):
        assert part in message


def test_missing_file(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere.pt", "does not exist")


def test_unknown_suffix(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(b"")
    refused(path, "'.bin'", ".safetensors")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"hello, this is no weights file" * 10])
def test_file_that_is_neither(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    refused(path)


class Exploit:
    def __reduce__(self) -> tuple:
        return (pytest.fail, ("code in a weights file was executed",))


def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"state_dict": Exploit()}, path, pickle_module=pickle)
    refused(path, "plain tensors")


def test_other_network(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(torch.nn.Linear(3, 3).state_dict(), path)
    refused(path, "lacks", "edge_out.fc.0.bias", "expected")


def test_unknown_key(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(tensors_of(SMALL) | {"surplus": torch.zeros(1)}, path)
    refused(path, "surplus")


def test_wrong_shape(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(tensors_of(SMALL) | {"gnn.convs.0.lin.weight": torch.zeros(5, 6)}, path)
    refused(path, "gnn.convs.0.lin.weight", "(5, 6)", "(6, 6)")


def test_token_position_embedding_points_to_the_variant_without(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(tensors_of(SMALL) | {"wte_pos_enc_layer.weight": torch.zeros(5, 6)}, path)
    refused(path, "wte_pos_enc_layer.weight", "nino_no_posw.pt")


@pytest.mark.parametrize(("name", "value"), [("hidden_dim", 0), ("context_len", 1), ("max_horizon", 2.5)])
def test_bad_hyper_parameter(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=name):
        NinoConfig(**{name: value})
