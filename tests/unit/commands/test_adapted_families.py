"""Low-rank adapters and heads of families, proved at tiny widths, with and without a graph builder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sidecast.commands.__main__ import main
from sidecast.commands.graph_check import check_config, tiny_model
from sidecast.commands.tiny_adapters import add_adapters, linear_layers
from sidecast.errors import ConfigError
from sidecast.graphs import build_topology, manifest_of_module
from sidecast.graphs.adapters import adapted_modules
from sidecast.graphs.axes.description import describe_axes
from sidecast.manifest import ModelManifest

DECODER = {
    "hidden_size": 12,
    "intermediate_size": 9,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "vocab_size": 11,
    "num_labels": 2,
}


@pytest.mark.parametrize(
    ("model_type", "architecture", "family"),
    [
        ("llama", "LlamaForSequenceClassification", "llama"),
        ("gpt2", "GPT2ForTokenClassification", "gpt2"),
        ("bloom", "BloomForCausalLM", "axis_graph"),
        ("falcon", "FalconForCausalLM", "axis_graph"),
        ("phi3", "Phi3ForSequenceClassification", "axis_graph"),
    ],
)
def test_adapters_and_heads_are_right(model_type: str, architecture: str, family: str) -> None:
    names = {"gpt2": ("n_embd", "n_layer", "n_head"), "bloom": ("hidden_size", "n_layer", "n_head")}
    sizes = dict(zip(names[model_type], (12, 2, 3), strict=True)) if model_type in names else DECODER
    config = {"model_type": model_type, "architectures": [architecture], "pad_token_id": None, **sizes}
    model, _ = tiny_model(config)
    topology, check = check_config(config, linear_layers(model))
    assert topology.family == family
    assert sum(".lora_A.default.weight" in block.name for block in topology.blocks) >= 8
    assert check.num_moved_elements > 0.9 * check.num_elements
    assert check.without_effect == ()


def test_an_adapter_in_the_wrong_place_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"model_type": "olmo", **DECODER}

    def add_to_others(model: torch.nn.Module, like: list[str]) -> None:
        add_adapters(model, like)
        gate, up = (model.get_submodule(f"model.layers.0.mlp.{name}_proj") for name in ("gate", "up"))
        gate.lora_A, up.lora_A = up.lora_A, gate.lora_A
        up.register_forward_pre_hook(lambda part, arguments: (arguments[0].flip(-1),))

    monkeypatch.setattr("sidecast.commands.graph_check.add_adapters", add_to_others)
    with pytest.raises(ConfigError, match="has a symmetry that the model lacks"):
        check_config(config, ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"])


def test_adapters_of_what_the_model_lacks_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"adapters adapt 'router', which LlamaForCausalLM does not have"):
        check_config({"model_type": "llama", **DECODER}, ["router"])
    with pytest.raises(ConfigError, match=r"'model.norm', a LlamaRMSNorm; a graph of a family has"):
        check_config({"model_type": "llama", **DECODER}, ["model.norm"])


def wrapped(name: str) -> str:
    """A parameter's name in a model that PEFT has wrapped."""
    adapted = name.endswith("proj.weight") or "proj.lora_" in name
    plain = f"base_model.model.{name}"
    return plain.replace("proj.weight", "proj.base_layer.weight") if adapted else plain


def test_a_model_that_was_followed_with_its_adapters_has_a_graph_under_saved_names() -> None:
    model, inputs = tiny_model({"model_type": "olmo", **DECODER})
    plain = describe_axes(model, inputs)
    adapted = tuple(linear_layers(model))
    add_adapters(model, adapted)
    manifest = manifest_of_module(model, inputs)
    described = {**manifest.config, "parameters": {wrapped(k): v for k, v in manifest.config["parameters"].items()}}
    factors = [(wrapped(spec.fqn), spec.shape) for spec in manifest.parameters if ".lora_" in spec.fqn]
    saved = [(name.replace(".default", ""), shape) for name, shape in factors]
    trained = build_topology(ModelManifest.from_shapes(factors, described), "symmetric")
    from_file = build_topology(ModelManifest.from_shapes(saved, described), "symmetric")
    assert trained.layers == from_file.layers
    assert [block.view.fqn for block in from_file.blocks if block.view] == [
        block.view.fqn.replace(".default", "") for block in trained.blocks if block.view
    ]
    assert {spec.fqn for spec in from_file.parameters} == {name for name, _ in saved}
    # The description of the model alone has a place for them too.
    beside = build_topology(ModelManifest.from_shapes(saved, plain), "symmetric")
    assert {block.view.fqn for block in beside.blocks if block.view} == {name for name, _ in saved}
    assert adapted_modules(ModelManifest.from_shapes(saved, plain)) == adapted


def test_the_command_proves_and_draws_adapters_of_a_family_without_a_builder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": "olmo", **DECODER}))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    module = "base_model.model.model.layers.1.self_attn.q_proj"
    save_file(
        {f"{module}.lora_A.weight": torch.ones(2, 12), f"{module}.lora_B.weight": torch.ones(12, 2)},
        adapter / "adapter_model.safetensors",
    )
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "base")}))
    assert main(["graph", str(adapter), "--check", "--out", str(tmp_path / "graph.html")]) == 0
    assert "right with adapters, at tiny widths" in capsys.readouterr().out
