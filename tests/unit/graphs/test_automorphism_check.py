"""The check of a graph on its network: what it finds, says, leaves alone and refuses to guess."""

from __future__ import annotations

import copy
import re

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sidecast.errors import ConfigError, NoRoomError
from sidecast.graphs import automorphism_check, build_topology, double_precision, manifest_of_chain, manifest_of_module
from sidecast.graphs.automorphism_check import check_automorphisms
from sidecast.graphs.automorphisms import SmallGraph
from sidecast.graphs.block_automorphisms import BlockwiseGraph
from sidecast.manifest import ModelManifest
from tests.support.symmetric_models import SMALL_MODELS, RecurrentNet, ResidualNet, token_ids


def pixels() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(6))


@pytest.mark.parametrize("name", sorted(SMALL_MODELS))
def test_every_family_passes_the_check_edge_by_edge_and_range_by_range(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = SMALL_MODELS[name]()
    changes = []
    for max_edges in (10**6, 0):
        monkeypatch.setattr(automorphism_check, "_MAX_WRITTEN_EDGES", max_edges)
        check = check_automorphisms(model.topology(), model.module, model.inputs)
        assert check.num_moved_elements > 0.3 * model.manifest.num_elements
        assert check.largest_change < 1e-10
        changes.append(check)
    assert changes[0].num_moved_nodes == changes[1].num_moved_nodes


@pytest.mark.parametrize("name", sorted(SMALL_MODELS))
def test_what_is_drawn_on_ranges_is_an_automorphism_edge_by_edge(name: str) -> None:
    topology = SMALL_MODELS[name]().topology()
    ranges, edges, rng = BlockwiseGraph(topology), SmallGraph(topology), np.random.default_rng(0)
    vector_P = rng.standard_normal(edges.element_EF.max() + 1)
    images = [ranges.random_automorphism(rng), *ranges.elementary_automorphisms(rng)]
    assert len(images) > 1
    for image in images:
        assert (image != np.arange(len(image))).any()
        assert edges.is_automorphism(image)
        np.testing.assert_array_equal(ranges.permuted(image, vector_P), edges.permuted(image, vector_P))


def test_elementary_automorphisms_move_every_node_that_may_move() -> None:
    for name in ("llama", "residual_net", "mixtral"):
        graph = SmallGraph(SMALL_MODELS[name]().topology())
        moved = np.zeros(graph.num_nodes, dtype=bool)
        for image in graph.elementary_automorphisms(np.random.default_rng(0)):
            assert graph.is_automorphism(image)
            moved |= image != np.arange(graph.num_nodes)
        may_move = graph.may_move()
        assert not moved[~may_move].any()
        for layer in graph.topology.layers:
            nodes = slice(layer.nodes.start, layer.nodes.stop)
            assert moved[nodes].any() == may_move[nodes].any(), layer.name


@pytest.mark.parametrize("max_edges", [10**6, 0], ids=["edges", "ranges"])
def test_wrong_graph_is_refused_by_the_least_that_is_wrong(max_edges: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(automorphism_check, "_MAX_WRITTEN_EDGES", max_edges)
    mixing = nn.LocalResponseNorm(3, alpha=1.0)
    module = nn.Sequential(nn.Conv1d(4, 6, 1), nn.ReLU(), nn.Conv1d(6, 6, 1), mixing, nn.Conv1d(6, 3, 1))
    with pytest.raises(ConfigError) as refusal:
        manifest_of_chain(module, torch.randn(2, 4, 5))
    assert re.search(
        r"graph of Sequential has a symmetry that the model lacks: a permutation of the nodes of '2\.weight\.outputs', "
        r"with the parameters '2\.weight', '2\.bias', '4\.weight', changes the output by .* standard deviation; use",
        str(refusal.value),
    )


def test_the_network_is_left_as_it_was() -> None:
    module = ResidualNet().train()
    norm = module.norm1
    assert norm.running_var is not None
    norm.running_var.copy_(torch.arange(1.0, 7.0))
    before = copy.deepcopy(module.state_dict())
    state = torch.random.get_rng_state()
    manifest_of_module(module, pixels())
    assert all(part.training for part in module.modules())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_default_dtype() is torch.float32
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]), name
        assert tensor.dtype is before[name].dtype


class Casting(nn.Module):
    """Computes in single precision, whatever it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out_of = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.into(x.to(self.into.weight.dtype)))
        scale = hidden.float().square().mean(-1, keepdim=True) + hidden.to(torch.float32).exp().sum(-1, keepdim=True)
        return self.out_of(hidden * scale) + torch.zeros(3, dtype=torch.float32)


def test_casts_to_lower_precision_do_not_blur_the_check() -> None:
    module = Casting()
    shapes = [(name, tuple(parameter.shape)) for name, parameter in module.named_parameters()]
    topology = build_topology(ModelManifest.from_shapes(shapes, {"model_type": "sequential"}))
    check = check_automorphisms(topology, module, torch.randn(5, 4))
    assert 0 < check.largest_change < 1e-12


def test_frozen_parameters_are_checked_and_not_in_the_manifest() -> None:
    module = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    module[0].requires_grad_(requires_grad=False)
    manifest = manifest_of_module(module, torch.randn(5, 4))
    assert [spec.fqn for spec in manifest.parameters] == ["2.weight", "2.bias"]


@pytest.mark.parametrize("inputs", [torch.zeros(5, 4), torch.ones(5, 4)])
def test_placeholders_for_floating_point_inputs_are_replaced(inputs: Tensor) -> None:
    module = nn.Sequential(nn.Conv1d(5, 8, 1), nn.ReLU(), nn.LayerNorm(8), nn.Conv1d(8, 2, 1))
    with pytest.raises(ConfigError, match="has a symmetry that the model lacks"):
        manifest_of_chain(module, inputs[None, :, :1].expand(1, 5, 8))


def test_named_inputs_are_given_by_name() -> None:
    class Named(nn.Sequential):
        def forward(self, *, x: Tensor) -> Tensor:
            return self[1](torch.relu(self[0](x)))

    module = Named(nn.Linear(4, 6), nn.Linear(6, 3))
    assert manifest_of_chain(module, {"x": torch.randn(5, 4)}).num_elements == 51


def test_parameter_without_effect_is_warned_of() -> None:
    module = RecurrentNet(nn.GRU)
    with pytest.warns(UserWarning, match=r"does not depend on 'recurrent.weight_hh_l0' and 1 more with these example"):
        manifest_of_module(module, torch.tensor([[3], [5]]))


class Fails(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, torch.tensor([7])]


class Constant(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(super().forward(x).mean(1, keepdim=True), dim=1)


class Infinite(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 0


class Whole(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).argmax(1)


class Uncopied(nn.Sequential):
    def __deepcopy__(self, memo: object) -> Uncopied:
        raise RuntimeError("one of a kind")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Fails, r"Fails cannot be run with these example inputs: IndexError: index 7 is out of bounds"),
        (Constant, r"Constant gives the same output whatever its parameters"),
        (Infinite, r"Infinite gives outputs that are not finite"),
        (Whole, r"Whole returns no floating-point tensor"),
        (Uncopied, r"Uncopied cannot be copied, so its graph cannot be checked: one of a kind"),
    ],
)
def test_network_that_shows_nothing_is_refused(kind: type[nn.Sequential], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        manifest_of_chain(kind(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), torch.randn(5, 4))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (None, "is checked by running it, which needs example_inputs"),
        (3, "example_inputs is a int; allowed: a tensor, a sequence of arguments, a mapping of named ones"),
        (torch.empty(2, 7, device="meta"), "is on the meta device and has no values"),
        (torch.zeros(2, 7, dtype=torch.int64), r"only one number in a tensor of shape \(2, 7\)"),
        (torch.randn(2, 7), "RecurrentNet cannot be run with these example inputs: RuntimeError"),
    ],
)
def test_example_inputs_that_are_none_are_refused(inputs: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        manifest_of_module(RecurrentNet(nn.LSTM), inputs)  # type: ignore[arg-type]


def test_buffers_without_values_are_refused() -> None:
    module = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    module.register_buffer("table", torch.empty(3, device="meta"))
    with pytest.raises(ConfigError, match="buffer 'table' is on the meta device and has no values"):
        manifest_of_module(module, torch.randn(5, 4))


def test_network_that_does_not_fit_into_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(double_precision, "_free_bytes", lambda: 2**30)
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(4, 2**21), nn.ReLU(), nn.Linear(2**21, 8))
    with pytest.raises(NoRoomError, match=r"which takes 1\.2 GiB of memory; 1\.0 GiB are free"):
        manifest_of_module(module, torch.randn(5, 4))


@pytest.mark.parametrize(
    "error", [RuntimeError("len of a proxy"), AssertionError(), AttributeError("no such thing"), KeyError("missing")]
)
def test_whatever_a_module_raises_is_one_line(error: Exception) -> None:
    class Raises(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            raise error

    with pytest.raises(
        ConfigError, match=rf"^Raises cannot be run with these example inputs: {type(error).__name__}"
    ) as refusal:
        manifest_of_module(Raises(nn.Linear(4, 4)), torch.randn(5, 4))
    assert "\n" not in str(refusal.value)


def test_module_without_shapes_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"parameter '0\.weight' has no shape yet; run the module once"):
        manifest_of_chain(nn.Sequential(nn.LazyLinear(3)), token_ids(11))


def test_norms_and_biases_need_no_roles() -> None:
    for name in ("residual_net", "lstm", "gru_bidirectional"):
        layers = SMALL_MODELS[name]().topology().layers
        assert not [layer.name for layer in layers if layer.name.startswith("role")]
