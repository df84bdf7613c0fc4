"""Axes that are followed through a run: what is learned of dimensions, and the graphs that are drawn of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from sidecast.errors import ConfigError
from sidecast.graphs import build_topology, manifest_of_module, remember_graph
from sidecast.graphs.automorphism_check import check_automorphisms
from sidecast.graphs.axes.calls import Axes, Call
from sidecast.graphs.axes.description import describe_axes
from sidecast.graphs.axes.dimensions import Dimension, cut, factorised, hold, runs_of, sequence_of, unite
from sidecast.graphs.axes.operations import FOLLOWED
from sidecast.manifest import ModelManifest
from tests.support.symmetric_models import DECODER, token_ids


def shape_of(dimension: Dimension) -> list[tuple[int, list[tuple[int, int, bool]]]]:
    return [
        (run.offset, [(factor.dimension.size, factor.stride, factor.dimension.is_held) for factor in run.factors])
        for run in runs_of(dimension)
    ]


def test_factors_of_two_divisions_are_divided_further() -> None:
    one, other = Dimension(12), Dimension(12)
    factorised(one, (2, 6))
    factorised(other, (4, 3))
    unite(one, other)
    assert shape_of(one) == shape_of(other) == [(0, [(2, 6, False), (2, 3, False), (3, 1, False)])]


def test_divisions_that_do_not_fit_are_held() -> None:
    one, other = Dimension(12), Dimension(12)
    factorised(one, (2, 6))
    cut(other, (5, 7))
    unite(one, other)
    assert shape_of(one) == [(0, [(2, 6, True), (6, 1, True)])]
    assert shape_of(other) == [(0, [(5, 1, True)]), (5, [(7, 1, True)])]
    assert all(part.is_held for part in factorised(Dimension(6, segments=[Dimension(1), Dimension(5)]), (2, 3)))


def test_segments_are_cut_where_either_is() -> None:
    one, other = Dimension(6), Dimension(6)
    cut(one, (2, 4))
    cut(other, (4, 2))
    unite(one, other)
    assert [offset for offset, _ in shape_of(one)] == [offset for offset, _ in shape_of(other)] == [0, 2, 4]


def test_holding_a_whole_holds_its_parts_and_whatever_they_are_united_with() -> None:
    whole, part = Dimension(6), Dimension(3)
    unite(factorised(whole, (2, 3))[1], part)
    hold(whole)
    assert shape_of(part) == [(0, [(3, 1, True)])]
    later = Dimension(3)
    unite(later, part)
    assert shape_of(later) == [(0, [(3, 1, True)])]


def test_wholes_of_the_last_factors_are_divided_in_the_first() -> None:
    fused = sequence_of([Dimension(8), Dimension(4)])
    heads, places = factorised(fused, (3, 4))
    assert [offset for offset, _ in shape_of(heads)] == [0, 2]
    assert shape_of(places) == [(0, [(4, 1, False)])]


class Net(nn.Module):
    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self._forward = forward
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def described(config: Any) -> dict[str, Any]:
    with torch.random.fork_rng():
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return describe_axes(model, {"input_ids": token_ids(11), "use_cache": False})


def test_a_decoder_has_the_symmetries_that_its_builder_gives_it() -> None:
    """Heads in groups, dimensions of values in each group, rotary dimensions where they are."""
    sets = described(transformers.LlamaConfig(**{**DECODER, "num_hidden_layers": 1}))["sets"]
    free = [(each["size"], each["within"]) for each in sets if not each["is_held"]]
    stream, groups, heads, values, units = free
    assert (stream[0], groups[0], heads[0], values[0], units[0]) == (12, 2, 2, 4, 9)
    number = [each["size"] for each in sets].index(2)
    assert (stream[1], groups[1], heads[1], values[1], units[1]) == ([], [], [number], [number], [])


def test_queries_and_keys_are_free_without_rotary_embeddings() -> None:
    config = transformers.GPT2Config(n_embd=12, n_layer=1, n_head=3, n_inner=9, vocab_size=11, n_positions=8)
    sets = described(config)["sets"]
    heads = next(number for number, each in enumerate(sets) if each["size"] == 3)
    assert [each["size"] for each in sets if each["within"] == [heads] and not each["is_held"]] == [4, 4]


def test_what_is_not_followed_is_held_and_named() -> None:
    module = Net(lambda s, x: s.b(torch.fft.fft(s.a(x)).real), a=nn.Linear(4, 6), b=nn.Linear(6, 3))
    config = describe_axes(module, random(5, 4))
    assert "_fft_r2c" in config["held_at"]
    assert all(each["is_held"] for each in config["sets"])


@pytest.mark.parametrize(
    ("name", "forward"),
    [
        ("view", lambda s, x: s.b(s.a(x) + s.a(x).view(torch.int16).sum())),
        ("relu", lambda s, x: s.b(torch.relu(s.a(x)))),
        ("tanh", lambda s, x: s.b(torch.tanh(s.a(x)))),
    ],
)
def test_what_cannot_be_followed_as_it_is_called_is_held_and_named(
    name: str, forward: Callable[[Any, Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(call: Call) -> list[Axes]:
        raise AssertionError(call.name)

    monkeypatch.setitem(FOLLOWED, "relu", fails)
    monkeypatch.setitem(FOLLOWED, "tanh", lambda call: [[Dimension(1)] for _ in call.outputs])
    config = describe_axes(Net(forward, a=nn.Linear(4, 6), b=nn.Linear(6, 3)), random(5, 4))
    assert name in config["held_at"]
    assert all(each["is_held"] for each in config["sets"])


def test_attention_whose_kernel_rounds_places_up_is_followed() -> None:
    def forward(module: Any, x: Tensor) -> Tensor:
        query, key, value = (part(x).unflatten(2, (3, 4)).transpose(1, 2) for part in (module.q, module.k, module.v))
        attend = torch.ops.aten._scaled_dot_product_efficient_attention
        attended = attend(query, key, value, None, compute_log_sumexp=True)[0]
        return module.o(attended.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    with torch.device("meta"):
        module = Net(forward, **{name: nn.Linear(12, 12) for name in "qkvo"})
    config = describe_axes(module, random(2, 5, 12))
    assert config["held_at"] == []
    assert {each["size"] for each in config["sets"] if not each["is_held"]} == {3, 4}


def test_parameters_without_a_use_and_rows_without_one_are_held() -> None:
    module = Net(
        lambda s, x: s.a(x + s.table.weight[:2]), a=nn.Linear(6, 3), table=nn.Embedding(5, 6), c=nn.Linear(7, 8)
    )
    sets = describe_axes(module, random(4, 2, 6))["sets"]
    assert {each["size"] for each in sets if not each["is_held"]} == set()


def test_running_statistics_do_not_hold_channels() -> None:
    module = Net(lambda s, x: s.c(s.n(s.a(x))), a=nn.Conv2d(3, 6, 3), n=nn.BatchNorm2d(6), c=nn.Conv2d(6, 2, 1))
    nn.init.normal_(module.n.running_mean)
    sets = describe_axes(module, random(2, 3, 5, 5))["sets"]
    assert [each["size"] for each in sets if not each["is_held"]] == [6]


def test_the_module_stays_as_it_is() -> None:
    module = Net(lambda s, x: s.a(s.drop(x)), a=nn.Linear(4, 3), drop=nn.Dropout(0.5))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    describe_axes(module, random(5, 4))
    assert module.training
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_parts_keep_their_modes_and_buffers_that_forward_writes_keep_their_values() -> None:
    def forward(module: Any, x: Tensor) -> Tensor:
        module.count.add_(1)
        module.last = x.sum()
        return module.a(x)  # type: ignore[no-any-return]

    module = Net(forward, a=nn.Linear(4, 3), drop=nn.Dropout(0.5))
    module.register_buffer("count", torch.zeros(1))
    module.register_buffer("last", torch.full((), 7.0))
    module.drop.eval()
    count = module.count
    describe_axes(module, random(5, 4))
    assert (module.training, module.a.training, module.drop.training) == (True, True, False)
    assert module.count is count
    assert (count.item(), module.last.item()) == (0.0, 7.0)


def test_frozen_parameters_are_absent() -> None:
    module = Net(lambda s, x: s.b(torch.fft.fft(x).real + s.a(x)), a=nn.Linear(4, 4), b=nn.Linear(4, 3))
    module.a.weight.requires_grad_(False)
    topology = build_topology(manifest_of_module(module, random(5, 4)), "symmetric")
    assert topology.absent == ("a.weight",)
    assert check_automorphisms(topology, module, random(5, 4)).num_elements == 19


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"sets": 3, "parameters": {}},
        {"sets": [{"size": 3}], "parameters": {}},
        {"sets": [], "parameters": {"a": {"shape": [3], "kind": "shift", "parts": [{"factors": [[0, 1]]}]}}},
        {"sets": [], "parameters": {"a": {"shape": [3], "kind": "shift", "parts": []}}},
        {"sets": [], "parameters": {"a": {"kind": "shift", "parts": []}}},
        {"sets": [], "parameters": {"a": 3}},
    ],
    ids=str,
)
def test_descriptions_that_are_none_are_one_line(config: dict[str, Any]) -> None:
    manifest = ModelManifest.from_shapes([("a", (3,))], {"model_type": "axis_graph", **config})
    with pytest.raises(ConfigError, match=r"description|describe the axes"):
        build_topology(manifest, "symmetric")


def test_a_description_of_another_shape_is_refused() -> None:
    """A weight of (inputs, outputs) has as many elements as one of (outputs, inputs)."""
    module = Net(lambda s, x: s.b(torch.fft.fft(x).real + s.a(x)), a=nn.Linear(4, 4), b=nn.Linear(4, 3))
    config = describe_axes(module, random(5, 4))
    shapes = [(name, tuple(parameter.shape)[::-1]) for name, parameter in module.named_parameters()]
    with pytest.raises(ConfigError, match=r"'b.weight' has shape \(4, 3\); the model's configuration implies \(3, 4\)"):
        build_topology(ModelManifest.from_shapes(shapes, config), "symmetric")


@pytest.mark.parametrize(
    ("offset", "strides", "message"),
    [
        (0, (2, 1), "has a stride of 2, where faster ones reach 2 elements far; strides must nest"),
        (0, (3, 0), "has a stride of 0, where faster ones reach 0 elements far; strides must nest"),
        (0, (4, 1), "reaches from element 0 to 6; it has 6"),
        (1, (3, 1), "reaches from element 1 to 6; it has 6"),
        (-1, (3, 1), "reaches from element -1 to 4; it has 6"),
    ],
    ids=str,
)
def test_descriptions_whose_elements_are_not_each_there_once_are_refused(
    offset: int, strides: tuple[int, int], message: str
) -> None:
    part = {"offset": offset, "factors": [[0, strides[0]], [1, strides[1]]], "source": [1], "target": [0], "kernel": []}
    config = {
        "model_type": "axis_graph",
        "sets": [{"size": size, "is_held": False, "within": []} for size in (2, 3)],
        "parameters": {"a": {"shape": [2, 3], "kind": "matrix", "parts": [part]}},
    }
    with pytest.raises(ConfigError, match=message):
        build_topology(ModelManifest.from_shapes([("a", (2, 3))], config), "symmetric")


def test_a_remembered_graph_is_what_training_sends() -> None:
    from sidecast.trainer.hook.training_run import model_config_of

    module = Net(lambda s, x: s.b(torch.tanh(s.a(x))), a=nn.Linear(4, 6), b=nn.Linear(6, 3))
    assert model_config_of(module) == {}
    assert remember_graph(module, random(5, 4)).config == model_config_of(module) != {}
