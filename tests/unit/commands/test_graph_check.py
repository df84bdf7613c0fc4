"""``sidecast graph --check``: a line of result, and a refusal of what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from sidecast.commands.__main__ import main
from sidecast.commands.graph_check import check_config
from sidecast.commands.tiny_configs import scaled, shrunken
from sidecast.errors import ConfigError
from sidecast.graphs import graph_builders
from sidecast.graphs.assembler import TopologyAssembler

WIDE = {
    "Llama": {"num_key_value_heads": 8, "attention_bias": True, "head_dim": 64, "vocab_size": 32000},
    "Qwen2": {"use_sliding_window": True},
    "Mixtral": {"num_local_experts": 64},
}
MODULES = """
import torch
from torch import nn

def right():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), torch.randn(5, 4)

def wrong():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), torch.randn(5, 3)

def bare():
    return nn.Linear(4, 6)

def fails():
    raise KeyError("nothing")
"""


def write(folder: Path, name: str, **options: object) -> Path:
    config = getattr(transformers, f"{name}Config")(**options)
    file = folder / "config.json"
    file.write_text(config.to_json_string(use_diff=False))
    return file


@pytest.mark.parametrize("name", WIDE)
def test_a_family_is_checked_at_tiny_widths(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["graph", "--check", str(write(tmp_path, name, **WIDE[name]))]) == 0
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    assert line.startswith(f"{name.lower()}, symmetric: right at tiny widths: 4 permutations that keep the graph ")


def test_a_wrong_builder_fails_the_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    builder = graph_builders()["llama"]

    def draw(assembler: TopologyAssembler, config: object) -> None:
        assembler.structural = lambda *_, **__: None  # type: ignore[method-assign]
        builder.layouts["symmetric"](assembler, config)  # type: ignore[arg-type]

    wrong = replace(builder, layouts={"symmetric": draw})
    monkeypatch.setitem(graph_builders(), "llama", wrong)
    assert main(["graph", "--check", str(write(tmp_path, "Llama"))]) == 2
    streams = capsys.readouterr()
    assert not streams.out
    assert "sidecast: the graph of LlamaForCausalLM has a symmetry that the model lacks" in streams.err


def test_shrinking_keeps_what_decides_on_the_graph() -> None:
    grouped = shrunken({"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128})
    assert grouped == {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}
    wide = shrunken({"hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 1, "head_dim": 128})
    assert wide == {"hidden_size": 12, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 6}
    alone = shrunken({"hidden_size": 768, "num_attention_heads": 12, "head_dim": None, "hidden_act": "gelu"})
    assert alone == {"hidden_size": 12, "num_attention_heads": 3, "head_dim": None, "hidden_act": "gelu"}
    with pytest.raises(ConfigError, match="num_attention_heads='8'; it must be a positive integer"):
        shrunken({"hidden_size": 8, "num_attention_heads": "8"})


def test_two_heads_without_groups_stay_without() -> None:
    small = shrunken({"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2})
    assert small == {"hidden_size": 12, "num_attention_heads": 3, "num_key_value_heads": 3}


@pytest.mark.parametrize("make_small", [shrunken, scaled])
def test_a_single_layer_stays_single(make_small: Callable[[dict[str, object]], dict[str, object]]) -> None:
    config = {"num_hidden_layers": 1, "architectures": ["LlamaForCausalLM"], "kinds": {"0": "a"}}
    assert make_small(config) == {**config, "kinds": {0: "a"}}


@pytest.mark.parametrize(
    "config",
    [
        {"hidden_size": 64, "num_heads": 2, "expand": [2]},
        {"hidden_size": 64, "num_heads": 2, "expand": "two"},
        {"hidden_size": 64, "num_heads": 2, "mamba_n_heads": 2, "mamba_d_head": 8, "mamba_expand": [2]},
    ],
    ids=str,
)
def test_numbers_that_are_none_are_named(config: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="it must be a positive integer"):
        shrunken(config)


def test_kinds_of_layers_may_be_anything() -> None:
    assert shrunken({"n_layer": 3, "layer_types": [["a"], ["b"], ["a"]]})["layer_types"] == [["a"], ["b"]]


def test_groups_of_experts_stay_groups() -> None:
    config = {"n_group": 8, "topk_group": 4, "n_routed_experts": 256, "num_experts_per_tok": 8}
    assert shrunken(config) == {"n_group": 2, "topk_group": 1, "n_routed_experts": 4, "num_experts_per_tok": 2}
    alone = {"n_group": 1, "topk_group": 1, "n_routed_experts": 3, "num_experts_per_tok": 2}
    assert shrunken(config, num_groups=1) == alone
    assert shrunken({**config, "n_group": 1, "topk_group": 1}) == alone


@pytest.mark.parametrize(("num_experts", "num_groups", "num_kept"), [(64, 8, 4), (3, 3, 3)])
def test_a_family_is_checked_with_groups_where_it_runs_with_them(
    num_experts: int, num_groups: int, num_kept: int
) -> None:
    config = transformers.DeepseekV3Config(n_routed_experts=num_experts, n_group=num_groups, topk_group=2)
    topology, _ = check_config({**config.to_dict(), "architectures": ["DeepseekV3ForCausalLM"]})
    shapes = {spec.fqn: spec.shape for spec in topology.parameters}
    assert shapes["model.layers.1.mlp.gate.weight"] == (num_kept, 12)


def test_scaling_keeps_what_widths_depend_on() -> None:
    small = scaled(
        {"hidden_size": 512, "num_attention_heads": 8, "head_dim": 64, "layer_types": list("aaba"), "n_layer": 4}
    )
    assert small == {
        "hidden_size": 32,
        "num_attention_heads": 8,
        "head_dim": 4,
        "layer_types": ["a", "b"],
        "n_layer": 2,
    }


def test_a_family_without_a_builder_is_followed_by_axes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["graph", "--check", str(write(tmp_path, "Gemma2"))]) == 0
    assert capsys.readouterr().out.startswith("axis_graph, symmetric: right at tiny widths: ")


@pytest.fixture
def _modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "modules_to_check.py").write_text(MODULES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("_modules")
def test_a_module_is_checked_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    out = tmp_path / "graph.html"
    assert main(["graph", "--check", "--module", "modules_to_check:right", "--out", str(out)]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("module_graph, symmetric: right of Sequential: ")
    assert second.endswith(f"-> {out}")


@pytest.mark.usefixtures("_modules")
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--module", "modules_to_check:wrong"], "Sequential cannot be run with these example inputs: RuntimeError"),
        (["--module", "modules_to_check:bare"], r"gave a Linear; it must give \(module, example_inputs\)"),
        (["--module", "modules_to_check:fails"], "modules_to_check:fails failed: KeyError: 'nothing'"),
        (["--module", "modules_to_check:none"], "failed: AttributeError: module 'modules_to_check' has no attribute"),
        (["--module", "modules_to_check"], "--module is 'modules_to_check'; it must be MODULE:FUNCTION"),
        (["--module", "no_such_module:make"], "failed: ModuleNotFoundError: No module named 'no_such_module'"),
        (["--layout", "official", "config.json"], "--layout is 'official', .* a check needs 'symmetric'"),
        (["config.json", "--module", "modules_to_check:right"], "give either MODEL or --module"),
        ([], "give either MODEL or --module"),
        (["config.json", "--snapshot", "weights"], "--snapshot is for a drawing; give --out FILE too, or leave it out"),
        (
            ["config.json", "--unknown-parameters", "error"],
            "--unknown-parameters is for a drawing; give --out FILE too, or leave it out",
        ),
        (
            ["--module", "modules_to_check:right", "--unknown-parameters", "isolate"],
            "--unknown-parameters is about parameters that a family's graph does not know; --module has none",
        ),
        (["config.json"], "model_type 'sequential' names no class to run; give --module instead"),
    ],
)
def test_what_is_wrong_or_cannot_be_checked_is_one_line(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("config.json").write_text(json.dumps({"model_type": "sequential"}))
    assert main(["graph", "--check", *argv]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    with pytest.raises(ConfigError, match=message):
        raise ConfigError(error)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llama", "hidden_size": "64"},
        {"model_type": "llama", "hidden_size": 10, "num_attention_heads": 4},
        {"model_type": "llama", "num_attention_heads": 0},
        {"model_type": "llama", "rope_scaling": {"type": "nope"}},
        {"model_type": "llama", "architectures": ["AutoModelForCausalLM"]},
        {"model_type": "llama", "architectures": ["Trainer"]},
        {"model_type": "llama", "architectures": ["pipeline"]},
    ],
    ids=str,
)
def test_configurations_that_transformers_refuses_are_one_line(
    config: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    assert main(["graph", str(file), "--out", str(tmp_path / "graph.html")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_drawing_needs_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["graph", str(write(tmp_path, "Llama"))]) == 2
    assert "give --out FILE to draw the graph, or --check to check it" in capsys.readouterr().err
