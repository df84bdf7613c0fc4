"""``--names FILE``: parameters that other people call otherwise."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sidecast.commands.__main__ import main
from sidecast.commands.names_file import with_names
from sidecast.errors import ConfigError
from sidecast.graphs import build_topology
from sidecast.graphs.axes.description import describe_axes
from sidecast.manifest import ModelManifest
from tests.support.symmetric_models import SMALL_MODELS

PAGE = Path(__file__).parents[3] / "docs" / "graph-builders.md"
# What the rules of the page undo.
_META = (
    (r"model\.embed_tokens", "tok_embeddings"),
    (r"lm_head", "output"),
    (r"model\.norm", "norm"),
    (r"model\.layers", "layers"),
    (r"self_attn\.([qkvo])_proj", r"attention.w\1"),
    (r"mlp\.gate_proj", "feed_forward.w1"),
    (r"mlp\.down_proj", "feed_forward.w2"),
    (r"mlp\.up_proj", "feed_forward.w3"),
    (r"input_layernorm", "attention_norm"),
    (r"post_attention_layernorm", "ffn_norm"),
)


def meta_name(name: str) -> str:
    for pattern, replacement in _META:
        name = re.sub(pattern, replacement, name)
    return name


@pytest.fixture
def rules(tmp_path: Path) -> Path:
    match = re.search(r"```names\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert match is not None
    (tmp_path / "meta.names").write_text(match[1])
    return tmp_path / "meta.names"


def renamed(manifest: ModelManifest) -> ModelManifest:
    return ModelManifest.from_shapes([(meta_name(s.fqn), s.shape) for s in manifest.parameters], manifest.config)


@pytest.mark.parametrize("layout", ["official", "symmetric"])
def test_the_graph_is_the_familys_under_the_checkpoints_names(rules: Path, layout: str) -> None:
    plain = SMALL_MODELS["llama"]().manifest
    topology = build_topology(with_names(renamed(plain), rules), layout)
    expected = build_topology(plain, layout)
    assert topology.layers == expected.layers
    assert [block.view.fqn for block in topology.blocks if block.view] == [
        meta_name(block.view.fqn) for block in expected.blocks if block.view
    ]


def test_a_family_that_is_followed_takes_other_names_too(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3))
    described = describe_axes(model, torch.randn(5, 4))
    shapes = [(f"net.{name}", tuple(each.shape)) for name, each in model.named_parameters()]
    (tmp_path / "names").write_text("^net\\. ->\n")
    topology = build_topology(with_names(ModelManifest.from_shapes(shapes, described), tmp_path / "names"), "symmetric")
    assert {block.view.fqn for block in topology.blocks if block.view} == {name for name, _ in shapes}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing", "line 1 is 'nothing'; it must be PATTERN -> REPLACEMENT"),
        ("# one\n( -> x", r"line 2: '\(': missing \)"),
        ("zzz -> y", "has no rule that fits a parameter; the first one is 'tok_embeddings.weight'"),
        (r"^(layers) -> \2", r"line 1: '\\\\2': invalid group reference"),
        (r"w[qk]\. -> wq.", r"gives 'layers.0.attention.w[qk].weight' and .* one name"),
    ],
)
def test_rules_that_are_none_are_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "names").write_text(text)
    with pytest.raises(ConfigError, match=message):
        with_names(renamed(SMALL_MODELS["llama"]().manifest), tmp_path / "names")


def test_the_commands_take_names_where_they_mean_something(
    tmp_path: Path, rules: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = SMALL_MODELS["llama"]().manifest
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({s.fqn: torch.ones(s.shape) for s in renamed(plain).parameters}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(dict(plain.config)))
    other = shutil.copytree(folder, tmp_path / "other")
    picture = ["--out", str(tmp_path / "graph.html")]
    assert main(["graph", str(folder), "--names", str(rules), *picture]) == 0
    capsys.readouterr()
    for arguments, message in (
        (["graph", str(folder), *picture], "does not know parameter"),
        (["graph", str(folder), "--check", "--names", str(rules)], "--names is for a drawing"),
        (["graph", str(folder / "config.json"), "--names", str(rules), *picture], "has none; leave it out"),
        (["graph", "--module", "m:f", "--check", "--names", str(rules)], "--module has its own; leave it out"),
        (
            ["predict", str(folder), str(other), "--names", str(rules), "--out", str(tmp_path / "o")],
            "'linear' has none",
        ),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_gpt2_is_drawn_with_linear_layers_as_well(tmp_path: Path) -> None:
    plain = SMALL_MODELS["gpt2"]().manifest
    turned = [(s.fqn, s.shape[::-1] if ".c_" in s.fqn and len(s.shape) == 2 else s.shape) for s in plain.parameters]
    for layout in ("official", "symmetric"):
        one = build_topology(plain, layout)
        other = build_topology(ModelManifest.from_shapes(turned, plain.config), layout)
        assert one.layers == other.layers
        for here, there in zip(one.blocks, other.blocks, strict=True):
            assert (here.source, here.target, here.name) == (there.source, there.target, there.name)
        fused = next(b.view for b in other.blocks if b.view and b.view.fqn == "transformer.h.0.attn.c_attn.weight")
        assert {fused.source_stride, fused.target_stride} == {1, 12}
