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
from safetensors.torch import load_file, save_file

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


def test_a_file_and_shards_are_drawn_as_the_folder_is(model_dir: Path, tmp_path: Path) -> None:
    tensors = load_file(model_dir / "model.safetensors")
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "config.json").write_bytes((model_dir / "config.json").read_bytes())
    weight_map = {name: f"part-{index % 2}.safetensors" for index, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, shards / file)
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    pages = []
    for model in (model_dir, model_dir / "model.safetensors", shards):
        assert run(model, "--out", tmp_path / "graph.html") == 0
        pages.append((tmp_path / "graph.html").read_text())
    assert pages[0].count("data:image/png") >= 15
    assert pages[1:] == [pages[0], pages[0]]


def test_a_file_holds_more_than_parameters(model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = load_file(model_dir / "model.safetensors")
    save_file({**tensors, "model.rotary_emb.inv_freq": torch.ones(3)}, model_dir / "model.safetensors")
    assert run(model_dir, "--out", tmp_path / "graph.html") == 0
    assert capsys.readouterr().out.startswith("llama, official: ")


def test_a_folder_with_a_configuration_alone_has_shapes_only(model_dir: Path, tmp_path: Path) -> None:
    (model_dir / "model.safetensors").rename(model_dir / "pytorch_model.bin")
    assert run(model_dir, "--out", tmp_path / "graph.html") == 0
    assert "data:image/png" not in (tmp_path / "graph.html").read_text()


def test_refusals_name_what_is_wrong(model_dir: Path, tmp_path: Path) -> None:
    def refused(words: str, *argv: object) -> None:
        with pytest.raises(ConfigError, match=words) as refusal:
            run(*argv, "--out", tmp_path / "graph.html")
        assert "\n" not in str(refusal.value)

    with pytest.raises(ConfigError, match=r"--out is 'graph.svg'; its name must end in .html or .png"):
        run(model_dir, "--out", "graph.svg")
    accepted = r"give a model's folder \(.*\), its config.json, or a .safetensors file with a config.json beside it$"
    refused(rf"nowhere does not exist; {accepted}", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    refused(rf"empty is no model that can be drawn; {accepted}", tmp_path / "empty")
    (tmp_path / "weights.bin").write_bytes(bytes([0xFF, 0xFE]))
    refused(rf"weights.bin is no model that can be drawn; {accepted}", tmp_path / "weights.bin")
    (tmp_path / "bare.safetensors").write_bytes((model_dir / "model.safetensors").read_bytes())
    refused(r"bare.safetensors has no config.json with it; .* as --snapshot", tmp_path / "bare.safetensors")
    (tmp_path / "list.json").write_text("[]")
    refused(r"list.json holds a JSON list; an object is needed", tmp_path / "list.json")
    (tmp_path / "bad.safetensors").write_bytes(b"no weights")
    refused(r"bad.safetensors is not a readable safetensors", model_dir, "--snapshot", tmp_path / "bad.safetensors")
    bare = tmp_path / "bare.json"
    bare.write_text('{"model_type": "lama"}')
    refused(r"model_type='lama'; without weights it must name a class", bare)


def test_a_picture_that_cannot_be_written_is_one_line(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--out .*nowhere/graph.html cannot be written: No such file or directory$"):
        run(model_dir, "--out", tmp_path / "nowhere" / "graph.html")


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
