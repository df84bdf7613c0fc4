"""Names of parameters: what wrappers add to them, what saving makes of them, and those of another model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from sidecast.errors import ConfigError
from sidecast.graphs import build_topology, topology_of_module
from sidecast.manifest import ModelManifest
from tests.support.symmetric_models import SMALL_MODELS


@pytest.fixture(scope="module")
def llama() -> ModelManifest:
    return SMALL_MODELS["llama"]().manifest


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: f"module._orig_mod.module.{name}",
        lambda name: f"_forward_module.{name}",
        lambda name: "_fsdp_wrapped_module." + name.replace("layers.1.", "layers.1._fsdp_wrapped_module."),
        lambda name: name.replace("layers.0.", "layers.0._checkpoint_wrapped_module."),
        lambda name: f"_orig_mod.base_model.model.{name}",
    ],
)
def test_names_are_taken_out_of_wrappers(llama: ModelManifest, wrapped: Callable[[str], str]) -> None:
    shapes = [(wrapped(spec.fqn), spec.shape) for spec in llama.parameters]
    topology = build_topology(ModelManifest.from_shapes(shapes, llama.config))
    plain = build_topology(llama)
    assert topology.layers == plain.layers
    assert [spec.fqn for spec in topology.parameters] == [name for name, _ in shapes]
    assert [block.view.fqn for block in topology.blocks if block.view is not None] == [
        wrapped(block.view.fqn) for block in plain.blocks if block.view is not None
    ]


def test_a_module_that_is_called_module_keeps_its_name() -> None:
    module = nn.Sequential()
    module.add_module("module", nn.Linear(3, 2))
    assert {block.name for block in topology_of_module(module, torch.randn(4, 3)).blocks} >= {"module.weight"}
    shapes = [("a.module.weight", (4, 3)), ("module.weight", (2, 4))]
    topology = build_topology(ModelManifest.from_shapes(shapes, {"model_type": "sequential"}))
    assert [block.name for block in topology.blocks] == ["a.module.weight", "module.weight"]


def test_another_models_parameters_are_not_set_apart(llama: ModelManifest) -> None:
    manifest = ModelManifest.from_shapes([(f"backbone.{s.fqn}", s.shape) for s in llama.parameters], llama.config)
    with pytest.raises(ConfigError, match=r"knows only 0 of 21 parameters, and not 'backbone.*another model's"):
        build_topology(manifest, unknown_parameters="isolate")


def test_vision_transformers_have_one_graph_under_the_names_that_run_and_those_that_are_saved(tmp_path: Path) -> None:
    model = SMALL_MODELS["vit"]()
    model.module.save_pretrained(tmp_path)
    assert "vit.encoder.layer.0.attention.attention.query.weight" in load_file(tmp_path / "model.safetensors")
    parameters = dict(model.module.named_parameters())
    plain = build_topology(model.manifest, "symmetric")
    # Zeros and ones would be many tensors' values.
    for spec in model.manifest.parameters:
        parameters[spec.fqn].data = torch.randn(spec.shape, dtype=torch.float64)
    model.module.save_pretrained(tmp_path)
    names = {tensor.numpy().tobytes(): name for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    saved_of = {name: names[parameter.detach().numpy().tobytes()] for name, parameter in parameters.items()}
    shapes = [(saved_of[spec.fqn], spec.shape) for spec in model.manifest.parameters]
    topology = build_topology(ModelManifest.from_shapes(shapes, model.manifest.config), "symmetric")
    assert not topology.absent
    assert [(block.source, block.target, block.kind) for block in topology.blocks] == [
        (block.source, block.target, block.kind) for block in plain.blocks
    ]
    assert [block.view.fqn for block in topology.blocks if block.view is not None] == [
        saved_of[block.view.fqn] for block in plain.blocks if block.view is not None
    ]
