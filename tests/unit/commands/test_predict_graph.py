"""``sidecast predict`` with a predictor on graphs, for models without a graph builder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from sidecast.commands.__main__ import main
from sidecast.commands.family_graph import described_by_module
from sidecast.errors import ConfigError
from sidecast.graphs import Topology, build_topology
from sidecast.graphs.axes.dimensions import Dimension
from sidecast.graphs.axes.operations import FOLLOWED
from sidecast.manifest import ModelManifest
from sidecast.predictors.nino.config import NinoConfig
from sidecast.predictors.nino.weights import NinoWeights, save_weights

MODULE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.b(torch.einsum("ni,mi->mi", self.a(x).tanh(), self.a(x)))

def make():
    return Net(), torch.randn(5, 4)

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(5, 6), nn.Linear(6, 5, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens):
        return self.head(self.table(tokens).tanh())

def make_tied():
    return Tied(), torch.arange(5)[None]
"""


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """An untrained predictor of three states."""
    config = NinoConfig(gnn=True, hidden_dim=4, max_horizon=2, lpe_dim=2, context_len=3)
    generator = torch.Generator().manual_seed(1)
    tensors = {key: torch.randn(shape, generator=generator) / 3 for key, shape in config.shapes().items()}
    save_weights(tmp_path / "nino.safetensors", NinoWeights(config, tensors, "memory"))
    return tmp_path / "nino.safetensors"


def checkpoints(folder: Path, state: dict[str, torch.Tensor], config: dict[str, object] | None) -> list[str]:
    paths = []
    for step in (100, 200, 300):
        path = folder / f"checkpoint-{step}"
        path.mkdir()
        moved = {name: (tensor + step * torch.sin(tensor) / 1000).clone() for name, tensor in state.items()}
        save_file(moved, path / "model.safetensors", metadata={"format": "pt"})
        if config is not None:
            (path / "config.json").write_text(json.dumps(config))
        paths.append(str(path))
    return paths


def opt_checkpoints(tmp_path: Path) -> list[str]:
    config = transformers.OPTConfig(
        hidden_size=12, num_hidden_layers=1, ffn_dim=9, num_attention_heads=3, vocab_size=11, word_embed_proj_dim=12
    )
    with torch.device("meta"):
        model = transformers.OPTForCausalLM(config)
    generator = torch.Generator().manual_seed(2)
    state = {name: torch.randn(each.shape, generator=generator) for name, each in model.named_parameters()}
    return checkpoints(tmp_path, state, {**config.to_dict(), "architectures": ["OPTForCausalLM"]})


def test_a_family_of_transformers_is_followed_without_weights(tmp_path: Path, weights: Path) -> None:
    paths, out = opt_checkpoints(tmp_path), tmp_path / "out"
    assert main(["predict", *paths, "--predictor", "nino", "--weights", str(weights), "--out", str(out)]) == 0
    written = load_file(out / "model.safetensors")
    newest = load_file(f"{paths[-1]}/model.safetensors")
    assert set(written) == set(newest)
    assert all(not torch.equal(written[name], newest[name]) for name in newest)


def test_a_family_whose_axes_are_followed_wrongly_is_refused(
    tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, out = opt_checkpoints(tmp_path), tmp_path / "out"
    monkeypatch.setitem(FOLLOWED, "add", lambda call: [[Dimension(size) for size in o.shape] for o in call.outputs])
    assert main(["predict", *paths, "--predictor", "nino", "--weights", str(weights), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert "following its axes is not proved at tiny widths: the graph of OPTForCausalLM has a symmetry that" in error
    assert "give the model as --module" in error
    assert error.count("\n") == 1
    assert not out.exists()
    assert main(["graph", f"{paths[-1]}/config.json", "--out", str(tmp_path / "graph.html")]) == 2
    assert "give the model as --module, in place of MODEL" in capsys.readouterr().err


@pytest.mark.usefixtures("_module")
def test_a_module_tells_its_graph(tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator = torch.Generator().manual_seed(2)
    state = {
        "a.weight": torch.randn(6, 4, generator=generator),
        "a.bias": torch.randn(6, generator=generator),
        "b.weight": torch.randn(3, 6, generator=generator),
        "b.bias": torch.randn(3, generator=generator),
    }
    files = [f"{path}/model.safetensors" for path in checkpoints(tmp_path, state, None)]
    command = ["predict", *files, "--predictor", "nino", "--weights", str(weights), "--out", str(tmp_path / "out")]
    assert main(command) == 2
    assert "--module with saved models" in capsys.readouterr().err
    assert main([*command, "--module", "module_to_predict:make"]) == 0
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == set(state)


@pytest.mark.usefixtures("_module")
def test_what_a_module_ties_is_tied_in_the_graph_of_a_bare_file(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []

    def draw(manifest: ModelManifest, *options: object, **named: object) -> Topology:
        drawn.append(build_topology(manifest, "symmetric"))
        return drawn[-1]

    monkeypatch.setattr("sidecast.predictors.nino.graph_cache.build_topology", draw)
    files = [f"{path}/model.safetensors" for path in checkpoints(tmp_path, {"table.weight": torch.rand(5, 6)}, None)]
    command = ["predict", *files, "--predictor", "nino", "--weights", str(weights), "--out", str(tmp_path / "out")]
    assert main([*command, "--module", "module_to_predict:make_tied"]) == 0
    assert "head.weight.tie" in {block.name for block in drawn[0].blocks}


@pytest.mark.usefixtures("_module")
def test_a_tied_weight_under_its_further_name_alone_is_refused(
    tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [f"{path}/model.safetensors" for path in checkpoints(tmp_path, {"head.weight": torch.rand(5, 6)}, None)]
    command = ["predict", *files, "--predictor", "nino", "--weights", str(weights), "--out", str(tmp_path / "out")]
    assert main([*command, "--module", "module_to_predict:make_tied"]) == 2
    error = capsys.readouterr().err
    assert "hold 'head.weight', which --module ties to 'table.weight', and not 'table.weight' itself" in error
    assert error.count("\n") == 1


def test_ties_that_a_module_lacks_are_refused() -> None:
    saved = ModelManifest.from_shapes([("table.weight", (5, 6))], {}, {"head.weight": "table.weight"})
    module = ModelManifest.from_shapes([("table.weight", (5, 6)), ("head.weight", (5, 6))], {})
    with pytest.raises(ConfigError, match=r"tie 'head.weight' to 'table.weight', which are two parameters of --module"):
        described_by_module(saved, module)


@pytest.mark.usefixtures("_module")
def test_a_predictor_without_a_graph_needs_no_module(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [f"{path}/model.safetensors" for path in checkpoints(tmp_path, {"a": torch.ones(3)}, None)]
    assert main(["predict", *files, "--out", str(tmp_path / "out"), "--module", "module_to_predict:make"]) == 2
    assert "--module describes a graph, and predictor 'linear' has none" in capsys.readouterr().err


@pytest.fixture
def _module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "module_to_predict.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
