"""What builders refuse, what they do with frozen, adapted and unknown parameters, and what topologies are."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from sidecast.errors import ConfigError
from sidecast.graphs import (
    BlockKind,
    EdgeType,
    GraphBuilder,
    Topology,
    build_topology,
    registry,
    to_edges,
    topology_of_module,
)
from sidecast.graphs.automorphisms import SmallGraph
from sidecast.graphs.builders import BUILDERS
from sidecast.graphs.export import edge_features, from_edges
from sidecast.manifest import ModelManifest
from tests.support.symmetric_models import SMALL_MODELS, ResidualNet


def with_changes(
    manifest: ModelManifest,
    *,
    drop: str = r"$^",
    add: tuple[tuple[str, tuple[int, ...]], ...] = (),
    prefix: str = "",
    **config: object,
) -> ModelManifest:
    """The manifest without parameters that match, with others added, and with other configuration values."""
    shapes = [(prefix + spec.fqn, spec.shape) for spec in manifest.parameters if not re.search(drop, spec.fqn)]
    return ModelManifest.from_shapes([*shapes, *add], {**manifest.config, **config})


@pytest.fixture(scope="module")
def llama() -> ModelManifest:
    return SMALL_MODELS["llama"]().manifest


@pytest.fixture(scope="module")
def gpt2() -> ModelManifest:
    return SMALL_MODELS["gpt2"]().manifest


def test_unsupported_model_type_is_named_with_the_supported_ones(llama: ModelManifest) -> None:
    supported = sorted(model_type for builder in BUILDERS for model_type in builder.model_types)
    assert {"llama", "gpt2", "sequential"} < set(supported)
    with pytest.raises(
        ConfigError, match=f"'xlstm'; supported: {', '.join(supported)}; sidecast.graphs.remember_graph"
    ):
        build_topology(with_changes(llama, model_type="xlstm"))


def test_missing_model_type_is_named() -> None:
    with pytest.raises(ConfigError, match="model_type=None"):
        build_topology(ModelManifest.from_shapes([("w", (2, 2))]))


@pytest.mark.parametrize(("key", "value"), [("hidden_size", "12"), ("num_attention_heads", 0), ("vocab_size", True)])
def test_bad_width_is_named(llama: ModelManifest, key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"{key}={value!r}; it must be a positive integer"):
        build_topology(with_changes(llama, **{key: value}))


def test_missing_width_is_named(llama: ModelManifest) -> None:
    with pytest.raises(ConfigError, match="lacks 'intermediate_size'"):
        build_topology(with_changes(llama, intermediate_size=None))


def test_contradicting_shape_is_named(llama: ModelManifest) -> None:
    with pytest.raises(ConfigError, match=r"embed_tokens.weight' has shape \(11, 12\); .* implies \(13, 12\)"):
        build_topology(with_changes(llama, vocab_size=13))


def test_heads_that_groups_do_not_divide_are_refused(llama: ModelManifest) -> None:
    with pytest.raises(ConfigError, match="num_key_value_heads=3 does not divide num_attention_heads=4"):
        build_topology(with_changes(llama, num_key_value_heads=3))


def test_unknown_layout_and_unknown_policy_are_refused(llama: ModelManifest) -> None:
    with pytest.raises(ConfigError, match="layout is 'round'; allowed: official, symmetric"):
        build_topology(llama, "round")
    with pytest.raises(ConfigError, match="unknown_parameters is 'drop'; allowed: error, isolate"):
        build_topology(llama, unknown_parameters="drop")


def test_family_without_a_published_graph_says_what_it_has() -> None:
    with pytest.raises(ConfigError, match="'bert' has no 'official' layout; it has: symmetric"):
        SMALL_MODELS["bert_mlm"]().topology("official")


def test_official_refuses_biases_and_points_to_symmetric() -> None:
    with pytest.raises(ConfigError, match=r"'official' layout .* 'model.layers.0.*_proj.bias'; use layout 'symmetric'"):
        SMALL_MODELS["llama_biases"]().topology("official")


def test_the_default_layout_can_be_drawn_for_every_family(llama: ModelManifest) -> None:
    assert build_topology(llama, None).layout == "official"
    for name in ("qwen2", "mixtral", "bert_mlm", "vit", "residual_net"):
        assert build_topology(SMALL_MODELS[name]().manifest, None).layout == "symmetric"
    with pytest.raises(ConfigError, match="'qwen2' has no 'official' layout; it has: symmetric"):
        SMALL_MODELS["qwen2"]().topology("official")


def test_kernels_of_a_chain_lie_on_parallel_edges() -> None:
    shapes = [("0.weight", (8, 3, 5, 5)), ("1.weight", (2, 8, 1, 1))]
    topology = build_topology(ModelManifest.from_shapes(shapes, {"model_type": "sequential"}))
    assert [block.view.num_kernel_elements for block in topology.blocks if block.view] == [9, 9, 7, 1]
    elements = to_edges(topology).element_EF
    assert sorted(elements[elements >= 0].tolist()) == list(range(616))


def test_factors_of_a_weight_have_no_place_in_a_chain() -> None:
    for name in ("0.parametrizations.weight.original0", "0.weight_g", "0.weight_orig"):
        with pytest.raises(ConfigError, match=rf"{re.escape(name)}' is a factor of a weight"):
            build_topology(ModelManifest.from_shapes([(name, (4, 1))], {"model_type": "sequential"}))


@pytest.mark.parametrize("layout", ["official", "symmetric"])
def test_unknown_parameter_is_an_error_that_names_it(gpt2: ModelManifest, layout: str) -> None:
    manifest = with_changes(gpt2, add=(("value_head.weight", (1, 12)),))
    with pytest.raises(ConfigError, match=r"does not know parameter 'value_head.weight'; predictors without a graph"):
        build_topology(manifest, layout)


@pytest.mark.parametrize("shape", [(3, 4, 2), (5,), ()])
def test_isolated_parameter_lies_on_edges_of_its_own(gpt2: ModelManifest, shape: tuple[int, ...]) -> None:
    known = build_topology(gpt2)
    topology = build_topology(with_changes(gpt2, add=(("extra", shape),)), unknown_parameters="isolate")
    assert topology.blocks[:-1] == known.blocks
    block = topology.blocks[-1]
    assert block.source.start >= known.num_nodes
    assert block.target.start >= known.num_nodes
    elements = to_edges(topology).element_EF
    assert sorted(elements[elements >= 0].tolist()) == list(range(topology_size(topology)))


def topology_size(topology: Topology) -> int:
    return sum(spec.numel for spec in topology.parameters)


def test_frozen_parameters_keep_their_nodes_and_lose_their_edges(llama: ModelManifest) -> None:
    whole = build_topology(llama)
    topology = build_topology(with_changes(llama, drop=r"embed_tokens|k_proj"))
    assert topology.num_nodes == whole.num_nodes
    assert topology.layers == whole.layers
    assert topology.absent == (
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.k_proj.weight",
        "model.layers.1.self_attn.k_proj.weight",
    )
    kept = tuple(block for block in whole.blocks if not re.search(r"embed_tokens|k_proj", block.name))
    assert topology.blocks == kept


def lora(module: str, num_inputs: int, num_outputs: int, rank: int = 2) -> tuple[tuple[str, tuple[int, ...]], ...]:
    name = f"base_model.model.{module}"
    return (
        (f"{name}.lora_A.default.weight", (rank, num_inputs)),
        (f"{name}.lora_B.default.weight", (num_outputs, rank)),
    )


@pytest.mark.parametrize("layout", ["official", "symmetric"])
def test_adapters_run_beside_the_frozen_matrices_that_they_adapt(llama: ModelManifest, layout: str) -> None:
    module = "model.layers.1.self_attn"
    factors = (*lora(f"{module}.q_proj", 12, 16), *lora(f"{module}.k_proj", 12, 8))
    manifest = with_changes(llama, drop=".", add=factors)
    whole, topology = build_topology(llama, layout), build_topology(manifest, layout)
    by_fqn = {block.view.fqn: block for block in topology.blocks if block.view is not None}
    assert set(by_fqn) == {name for name, _ in factors}
    adapted = {block.edge_type: block for block in whole.blocks if ".1." in block.name and block.view is not None}
    query, key = adapted[EdgeType.QUERY], adapted[EdgeType.KEY]
    down, up = (by_fqn[name] for name, _ in factors[:2])
    assert (down.source, up.target, down.target) == (query.source, query.target, up.source)
    down, up = (by_fqn[name] for name, _ in factors[2:])
    assert (up.source, down.target, up.target) == (key.source, key.target, down.source)
    assert topology.num_nodes == whole.num_nodes + 4
    elements = to_edges(topology).element_EF
    assert sorted(elements[elements >= 0].tolist()) == list(range(manifest.num_elements))


def test_adapter_of_a_fused_matrix_reaches_all_its_parts(gpt2: ModelManifest) -> None:
    manifest = with_changes(gpt2, drop=".", add=lora("transformer.h.0.attn.c_attn", 12, 36))
    topology = build_topology(manifest)
    elements = to_edges(topology).element_EF
    assert sorted(elements[elements >= 0].tolist()) == list(range(manifest.num_elements))


def test_adapted_and_trained_parameters_keep_their_own_names(llama: ModelManifest) -> None:
    manifest = with_changes(llama, drop="q_proj", prefix="base_model.model.")
    names = {block.view.fqn for block in build_topology(manifest).blocks if block.view is not None}
    assert names == {spec.fqn for spec in manifest.parameters}


def test_adapter_of_an_unknown_matrix_is_refused(llama: ModelManifest) -> None:
    with pytest.raises(ConfigError, match=r"'base_model.model.router.lora_A.default.weight' adapts a matrix"):
        build_topology(with_changes(llama, add=lora("router", 12, 4)))


def test_half_an_adapter_is_refused(llama: ModelManifest) -> None:
    half = lora("model.layers.0.self_attn.q_proj", 12, 16)[:1]
    with pytest.raises(ConfigError, match="is one factor of an adapter; the manifest lacks the other"):
        build_topology(with_changes(llama, add=half))


def test_adapter_of_other_width_is_refused(llama: ModelManifest) -> None:
    with pytest.raises(ConfigError, match=r"maps 12 inputs to 15 outputs; .* has 12 and 16"):
        build_topology(with_changes(llama, add=lora("model.layers.0.self_attn.q_proj", 12, 15)))


@pytest.mark.parametrize("name", sorted(SMALL_MODELS))
def test_parameters_survive_the_graph_and_back(name: str) -> None:
    model = SMALL_MODELS[name]()
    topology = model.topology()
    edges = to_edges(topology)
    states_PC = torch.randn(model.manifest.num_elements, 5, generator=torch.Generator().manual_seed(0))
    features_EFC = edge_features(edges, states_PC).reshape(*edges.element_EF.shape, 5)
    for state in range(5):
        assert torch.equal(from_edges(topology, edges, features_EFC[..., state]), states_PC[:, state])


@pytest.mark.parametrize("name", sorted(SMALL_MODELS))
def test_layers_cover_every_node_once_and_topologies_survive_json(name: str) -> None:
    topology = SMALL_MODELS[name]().topology()
    ends = [0, *(layer.nodes.stop for layer in topology.layers)]
    assert [layer.nodes.start for layer in topology.layers] == ends[:-1]
    assert ends[-1] == topology.num_nodes
    again = Topology.from_json(topology.to_json())
    assert again == topology
    assert hash(again) == hash(topology)
    assert again.digest == topology.digest


def test_topologies_of_different_layouts_have_different_digests(llama: ModelManifest) -> None:
    assert build_topology(llama, "official").digest != build_topology(llama, "symmetric").digest


def test_bare_decoders_have_no_output_layer() -> None:
    for name, prefix in (("llama", "model."), ("gpt2", "transformer.")):
        wrapped = SMALL_MODELS[name]().manifest
        shapes = [(s.fqn.removeprefix(prefix), s.shape) for s in wrapped.parameters if s.fqn.startswith(prefix)]
        bare = build_topology(ModelManifest.from_shapes(shapes, {**wrapped.config, "tie_word_embeddings": False}))
        assert "logits" not in {layer.name for layer in bare.layers}
        assert not bare.absent


def test_experts_in_modules_of_their_own_are_drawn_as_fused_ones() -> None:
    fused = SMALL_MODELS["mixtral"]().manifest
    shapes = [(spec.fqn, spec.shape) for spec in fused.parameters if ".mlp." not in spec.fqn]
    for layer in range(2):
        name = f"model.layers.{layer}.block_sparse_moe"
        shapes.append((f"{name}.gate.weight", (3, 12)))
        for expert in range(3):
            for part, shape in (("w1", (9, 12)), ("w2", (12, 9)), ("w3", (9, 12))):
                shapes.append((f"{name}.experts.{expert}.{part}.weight", shape))
    split = build_topology(ModelManifest.from_shapes(shapes, fused.config), "symmetric")
    whole = build_topology(fused, "symmetric")
    assert [(b.source, b.target, b.edge_type) for b in split.blocks] == [
        (b.source, b.target, b.edge_type) for b in whole.blocks
    ]


def test_module_is_drawn_on_the_meta_device() -> None:
    with torch.device("meta"):
        module = ResidualNet()
    topology = topology_of_module(module, torch.randn(2, 3, 8, 8))
    depthwise = next(block for block in topology.blocks if block.name == "depthwise.weight")
    assert depthwise.kind is BlockKind.DIAGONAL
    stem = [block for block in topology.blocks if block.name.startswith("stem.weight")]
    assert [block.view.num_kernel_elements for block in stem if block.view] == [9, 9, 9, 9, 9, 4]
    assert topology.num_nodes == SmallGraph(topology).num_nodes


class CallsTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(torch.relu(self.layer(x)))


class Branches(CallsTwice):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) if x.sum() > 0 else x


class Sorts(CallsTwice):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sort(self.layer(x)).values


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (CallsTwice(), (2, 3)),
        (Branches(), (2, 3)),
        (Sorts(), (2, 3)),
        (nn.Sequential(nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4)), (2, 4, 3, 3)),
        (nn.Sequential(nn.Bilinear(2, 2, 2)), None),
        (nn.Sequential(nn.LSTM(3, 4, proj_size=2)), (2, 3)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_module_without_a_graph_of_layers_is_followed_by_axes(module: nn.Module, shape: tuple[int, ...] | None) -> None:
    if shape is None:
        with pytest.raises(ConfigError, match="Sequential cannot be run with these example inputs"):
            topology_of_module(module, torch.randn(2, 2))
        return
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    assert topology_of_module(module, inputs).family == "axis_graph"


def test_chain_refuses_shapes_that_do_not_follow() -> None:
    shapes = [("0.weight", (4, 3)), ("1.weight", (5, 8))]
    with pytest.raises(ConfigError, match=r"'1.weight' of shape \(5, 8\) does not read the 4 outputs"):
        build_topology(ModelManifest.from_shapes(shapes, {"model_type": "sequential"}))
    with pytest.raises(ConfigError, match=r"'scale' of shape \(2,\) belongs to no matrix"):
        build_topology(ModelManifest.from_shapes([("scale", (2,))], {"model_type": "sequential"}))


@pytest.fixture
def fresh_registry() -> object:
    registry.graph_builders.cache_clear()
    yield
    registry.graph_builders.cache_clear()


class EntryPoint:
    """Stands for another package's entry point."""

    def __init__(self, builder: GraphBuilder) -> None:
        self.builder = builder

    def load(self) -> GraphBuilder:
        return self.builder


def test_other_packages_add_builders(monkeypatch: pytest.MonkeyPatch, fresh_registry: object) -> None:
    def draw(assembler, config) -> None:
        inputs, outputs = assembler.nodes(2, "in"), assembler.nodes(3, "out")
        assembler.linear("w", inputs, outputs)

    builder = GraphBuilder(family="theirs", model_types=("theirs",), layouts={"official": draw})
    monkeypatch.setattr(registry, "entry_points", lambda group: [EntryPoint(builder)])
    topology = build_topology(ModelManifest.from_shapes([("w", (3, 2))], {"model_type": "theirs"}))
    assert (topology.family, topology.num_nodes) == ("theirs", 5)


def test_other_packages_cannot_replace_ours(monkeypatch: pytest.MonkeyPatch, fresh_registry: object) -> None:
    builder = GraphBuilder(family="theirs", model_types=("llama",), layouts={})
    monkeypatch.setattr(registry, "entry_points", lambda group: [EntryPoint(builder)])
    with pytest.raises(ConfigError, match="'llama' and 'theirs' both claim model_type 'llama'"):
        registry.graph_builders()


def test_rows_of_a_recurrent_layer_lie_on_their_gates_nodes() -> None:
    model = SMALL_MODELS["lstm"]()
    graph = SmallGraph(model.topology())
    position = 0
    for spec in model.manifest.parameters:
        elements, position = torch.arange(position, position + spec.numel), position + spec.numel
        if not spec.fqn.endswith("_l0"):
            continue
        for number, gate in enumerate(("input", "forget", "cell", "output")):
            rows = elements.reshape(spec.shape[0], -1)[number * 5 : number * 5 + 5]
            for row, node in zip(rows, graph.layer(f"recurrent.l0.{gate}"), strict=True):
                targets = graph.target[torch.isin(torch.from_numpy(graph.element_EF[:, 0]), row).numpy()]
                assert set(targets.tolist()) == {int(node)}
