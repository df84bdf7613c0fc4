"""``sidecast graph``: pages, images and refusals."""

from __future__ import annotations

import argparse
import json
import re
import struct
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import save_file

from sidecast.commands import graph
from sidecast.errors import ConfigError
from sidecast.graphs import build_topology
from sidecast.graphs.pictures.html import picture_html
from sidecast.graphs.pictures.picture import MAP_PX, arrange
from sidecast.graphs.pictures.weight_colours import weight_raster
from tests.support.symmetric_models import SMALL_MODELS


def run(*argv: object) -> int:
    parser = argparse.ArgumentParser()
    graph.add_parser(parser.add_subparsers())
    arguments = parser.parse_args(["graph", *map(str, argv)])
    return int(arguments.run(arguments))


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    model = SMALL_MODELS["llama"]()
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(dict(model.manifest.config), default=str))
    tensors = {name: parameter.detach().float().contiguous() for name, parameter in model.module.named_parameters()}
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_page_shows_every_edge_type_and_the_weights(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "graph.html"
    assert run(model_dir, "--out", out) == 0
    page = out.read_text()
    for name in ("token embedding", "query", "key", "value", "residual", "head", "norm"):
        assert name in page
    assert page.count("data:image/png") >= 15
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "")
    assert capsys.readouterr().out.startswith("llama, official: ")


def test_image_is_a_png_of_some_size(model_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "graph.png"
    assert run(model_dir, "--out", out, "--layout", "symmetric") == 0
    data = out.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", data[16:24])
    assert width > 1000
    assert height > 1000


def test_configuration_alone_is_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {**SMALL_MODELS["bert_mlm"]().manifest.config, "architectures": ["BertForMaskedLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config, default=str))
    out = tmp_path / "graph.html"
    assert run(tmp_path / "config.json", "--out", out) == 0
    assert "data:image/png" not in out.read_text()
    assert capsys.readouterr().out.startswith("bert, symmetric: ")


def test_without_architectures_the_model_type_is_taken_for_a_causal_language_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = dict(SMALL_MODELS["llama"]().manifest.config)
    config.pop("architectures", None)
    (tmp_path / "config.json").write_text(json.dumps(config, default=str))
    assert run(tmp_path / "config.json", "--out", tmp_path / "graph.html") == 0
    assert capsys.readouterr().out.startswith("llama, official: ")


def test_frozen_parameters_are_mentioned(model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    snapshot = tmp_path / "snapshot.safetensors"
    save_file({"model.norm.weight": torch.ones(12)}, snapshot)
    assert run(model_dir, "--snapshot", snapshot, "--out", tmp_path / "graph.html") == 0
    assert "parameters are absent (frozen) and have no edges" in capsys.readouterr().out


def test_refusals_name_what_is_wrong(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--out is 'graph.svg'; its name must end in .html or .png"):
        run(model_dir, "--out", "graph.svg")
    with pytest.raises(ConfigError, match=r"cannot read a model's configuration from .*nowhere"):
        run(tmp_path / "nowhere", "--out", "graph.html")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"list.json' holds a list"):
        run(tmp_path / "list.json", "--out", "graph.html")
    (tmp_path / "bad.safetensors").write_bytes(b"no weights")
    with pytest.raises(ConfigError, match=r"cannot read weights from .*bad.safetensors"):
        run(model_dir, "--snapshot", tmp_path / "bad.safetensors", "--out", "graph.html")
    bare = tmp_path / "bare.json"
    bare.write_text('{"model_type": "lama"}')
    with pytest.raises(ConfigError, match=r"model_type='lama'; without safetensors files it must name a class"):
        run(bare, "--out", "graph.html")


PICTURES = [*((name, "symmetric") for name in sorted(SMALL_MODELS)), ("qwen3", "official"), ("gpt2", "official")]


@pytest.mark.parametrize(("name", "layout"), PICTURES)
def test_every_family_has_a_picture_inside_its_frame(name: str, layout: str) -> None:
    topology = SMALL_MODELS[name]().topology(layout)
    picture = arrange(topology)
    assert len(picture.bands) == len(topology.layers)
    for patch in picture.patches:
        assert 0 <= patch.x <= patch.x + patch.width <= MAP_PX + 1e-6
        assert 0 <= patch.y <= patch.y + patch.height <= MAP_PX + 1e-6
    for ribbon in picture.ribbons:
        assert ribbon.source != ribbon.target
    for svg in re.findall(r"<svg.*?</svg>", picture_html(topology), flags=re.DOTALL):
        ElementTree.fromstring(svg.replace("class=grid", 'class="grid"'))


def test_computation_flows_from_left_to_right() -> None:
    picture = arrange(SMALL_MODELS["llama"]().topology())
    for ribbon in picture.ribbons:
        assert picture.bands[ribbon.source].x < picture.bands[ribbon.target].x, ribbon.label


def test_weights_below_zero_are_blue_and_above_zero_red() -> None:
    topology = build_topology(SMALL_MODELS["gpt2"]().manifest)
    block = next(block for block in topology.blocks if block.name.endswith("c_attn.q.weight"))
    assert block.view is not None
    weight = torch.zeros(12, 36)
    weight[3, 5], weight[4, 6] = 1.0, -1.0
    raster = weight_raster(block, {block.view.fqn: weight}.get)
    assert raster is not None
    assert tuple(raster[3, 5]) == (178, 24, 43)
    assert tuple(raster[4, 6]) == (33, 102, 172)
    assert tuple(raster[0, 0]) == (247, 247, 247)
    assert weight_raster(block, {}.get) is None
