"""The graph builder that the documentation shows works as a package of someone else's, and has the right symmetries."""

from __future__ import annotations

import json
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sidecast.commands.__main__ import main
from sidecast.errors import ConfigError
from sidecast.graphs import build_topology, graph_builders
from sidecast.graphs.automorphisms import SmallGraph
from sidecast.manifest import ModelManifest
from tests.support.edgewise_nino import CONTEXT, EdgewiseNino
from tests.support.symmetric_models import SmallModel

PAGE = Path(__file__).parents[2] / "docs" / "graph-builders.md"
SIZES = {"num_features": 5, "width": 7, "inner_width": 6, "num_layers": 2, "num_classes": 3}


def block(language: str, first_line: str) -> str:
    found = re.search(rf"```{language}\n({re.escape(first_line)}\n.*?)```", PAGE.read_text(), re.DOTALL)
    assert found is not None
    return found[1]


@pytest.fixture
def _installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What pip would put on the path."""
    project = tomllib.loads(block("toml", "# pyproject.toml"))["project"]
    (tmp_path / "gated_net.py").write_text(block("python", "# gated_net.py"))
    metadata = tmp_path / f"gated_net-{project['version']}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    points = project["entry-points"]["sidecast.graph_builders"]
    lines = ["[sidecast.graph_builders]\n", *(f"{name} = {value}\n" for name, value in points.items())]
    (metadata / "entry_points.txt").write_text("".join(lines))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "gated_net", raising=False)
    graph_builders.cache_clear()
    yield
    graph_builders.cache_clear()


@pytest.fixture
def model(_installed: None) -> SmallModel:
    namespace: dict[str, object] = {}
    exec(block("python", "# gated_net_model.py"), namespace)  # noqa: S102  (the page's own code)
    network = namespace["GatedNet"]
    assert isinstance(network, type)
    with torch.random.fork_rng():
        module = network(**SIZES).double().eval()
    shapes = [(name, tuple(parameter.shape)) for name, parameter in module.named_parameters()]
    inputs = torch.randn(4, SIZES["num_features"], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return SmallModel(module, ModelManifest.from_shapes(shapes, {"model_type": "gated_net", **SIZES}), (inputs,))


def test_every_automorphism_of_the_documented_graph_leaves_the_output_unchanged(model: SmallModel) -> None:
    rng = np.random.default_rng(0)
    graph = SmallGraph(model.topology())
    for _ in range(3):
        vector_P = model.random_vectors(rng, 1)[:, 0]
        permuted_P = graph.permuted(graph.random_automorphism(rng), vector_P)
        assert (permuted_P != vector_P).mean() > 0.3
        torch.testing.assert_close(model.output(permuted_P), model.output(vector_P), rtol=1e-9, atol=1e-9)


def test_known_symmetries_are_in_the_graph_and_known_wrong_ones_are_not(model: SmallModel) -> None:
    graph = SmallGraph(model.topology())
    stream, units = np.roll(np.arange(SIZES["width"]), 1), np.roll(np.arange(SIZES["inner_width"]), 2)
    streams = dict.fromkeys(("stream", "layers.0.stream", "layers.1.stream"), stream)
    halves = {"layers.1.gates": units, "layers.1.ups": units}
    assert graph.is_automorphism(graph.moved(streams))
    assert graph.is_automorphism(graph.moved(halves))
    assert not graph.is_automorphism(graph.moved({"layers.0.stream": stream}))
    assert not graph.is_automorphism(graph.moved({"layers.1.gates": units}))
    exchanged = graph.moved({})
    gates, ups = graph.layer("layers.0.gates"), graph.layer("layers.0.ups")
    exchanged[gates], exchanged[ups] = ups, gates
    assert not graph.is_automorphism(exchanged)


def test_the_documented_graph_holds_every_element_once_and_nowcasts_commute(model: SmallModel) -> None:
    rng = np.random.default_rng(2)
    graph = SmallGraph(model.topology())
    elements = np.sort(graph.element_EF[graph.element_EF >= 0])
    np.testing.assert_array_equal(elements, np.arange(model.manifest.num_elements))
    nino = EdgewiseNino(graph.element_EF.shape[1], seed=3)
    states_PC = model.random_vectors(rng, CONTEXT)
    image = graph.random_automorphism(rng)
    with torch.no_grad():
        nowcast_P = nino(graph.topology, torch.from_numpy(states_PC)).numpy()
        of_permuted = nino(graph.topology, torch.from_numpy(graph.permuted(image, states_PC))).numpy()
    np.testing.assert_allclose(of_permuted, graph.permuted(image, nowcast_P), atol=1e-6 * np.abs(nowcast_P).max())


def test_the_documented_builder_refuses_what_it_does_not_know(model: SmallModel) -> None:
    shapes = [(spec.fqn, spec.shape) for spec in model.manifest.parameters]
    config = model.manifest.config
    with pytest.raises(ConfigError, match=r"does not know parameter 'head\.bias'"):
        build_topology(ModelManifest.from_shapes([*shapes, ("head.bias", (3,))], config), "symmetric")
    without = {key: value for key, value in config.items() if key != "width"}
    with pytest.raises(ConfigError, match="lacks 'width'"):
        build_topology(ModelManifest.from_shapes(shapes, without), "symmetric")


def test_the_documented_command_draws_the_model(model: SmallModel, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(dict(model.manifest.config)))
    save_file(
        {name: tensor.float() for name, tensor in model.module.state_dict().items()}, folder / "model.safetensors"
    )
    assert main(["graph", str(folder), "--out", str(tmp_path / "gated_net.html")]) == 0
    assert "layers.1.gate" in (tmp_path / "gated_net.html").read_text()
