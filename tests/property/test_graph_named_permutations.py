"""Permutations by name: those that the network admits are the graph's, those that it does not are not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from sidecast.graphs.automorphisms import Ints, SmallGraph
from tests.support.symmetric_models import SMALL_MODELS, SmallModel

Moves = dict[str, Ints]


@dataclass(frozen=True)
class Permutation:
    """A node permutation of one small model.

    Attributes:
        model: Name of the model.
        what: What is permuted.
        moves: New order of the nodes of each layer that moves.
    """

    model: str
    what: str
    moves: Callable[[SmallGraph], Moves]

    def __str__(self) -> str:
        return f"{self.model}: {self.what}"


def heads_order(order: list[int], head_dim: int) -> Ints:
    return np.concatenate([np.arange(head_dim) + head * head_dim for head in order])


def inside_heads(order: list[int], num_heads: int) -> Ints:
    return np.concatenate([np.array(order) + head * len(order) for head in range(num_heads)])


def stream_everywhere(graph: SmallGraph) -> Moves:
    names = [name for name in graph.layers if name.endswith("stream")]
    order = np.random.default_rng(7).permutation(len(graph.layer(names[0])))
    return dict.fromkeys(names, order)


def attention(name: str, **moves: Ints) -> Callable[[SmallGraph], Moves]:
    return lambda _: {f"{name}.{layer}": order for layer, order in moves.items()}


LLAMA = "model.layers.1.self_attn"
GPT2 = "transformer.h.0.attn"
# Four query heads in two groups, heads of four dimensions.
SWAP_IN_GROUP, SWAP_ACROSS, SWAP_GROUPS = [1, 0, 2, 3], [2, 1, 0, 3], [2, 3, 0, 1]
DIMENSIONS = [2, 0, 3, 1]

ADMISSIBLE = [
    Permutation("llama", "residual stream of all blocks", stream_everywhere),
    Permutation("gpt2", "residual stream of all blocks", stream_everywhere),
    Permutation("bert_mlm", "residual stream of all blocks", stream_everywhere),
    Permutation("vit", "residual stream of all blocks", stream_everywhere),
    Permutation("mixtral", "residual stream of all blocks", stream_everywhere),
    Permutation(
        "llama",
        "query heads inside a group",
        attention(
            LLAMA,
            heads=np.array(SWAP_IN_GROUP),
            queries=heads_order(SWAP_IN_GROUP, 4),
            mixed=heads_order(SWAP_IN_GROUP, 4),
        ),
    ),
    Permutation(
        "qwen3",
        "key-value groups",
        attention(
            LLAMA,
            heads=np.array(SWAP_GROUPS),
            queries=heads_order(SWAP_GROUPS, 4),
            mixed=heads_order(SWAP_GROUPS, 4),
            keys=heads_order([1, 0], 4),
            values=heads_order([1, 0], 4),
        ),
    ),
    Permutation(
        "llama",
        "value dimensions, alike in all heads of a group",
        attention(LLAMA, values=inside_heads(DIMENSIONS, 2), mixed=inside_heads(DIMENSIONS, 4)),
    ),
    Permutation(
        "gpt2",
        "query and key dimensions without rotary embeddings",
        attention(GPT2, queries=inside_heads(DIMENSIONS, 3), keys=inside_heads(DIMENSIONS, 3)),
    ),
    Permutation(
        "llama",
        "hidden units",
        lambda _: {f"model.layers.0.mlp.{part}": np.roll(np.arange(9), 1) for part in ("hidden", "up")},
    ),
    Permutation(
        "mixtral",
        "experts",
        lambda _: (
            {"model.layers.0.mlp.experts": np.array([1, 0, 2])}
            | {
                "swap": np.array([0, 1])  # layers of the two experts, exchanged below
            }
        ),
    ),
    Permutation(
        "lstm",
        "hidden units",
        lambda _: {
            f"recurrent.l0.{part}": np.roll(np.arange(5), 2) for part in ("input", "forget", "cell", "output", "hidden")
        },
    ),
]

INADMISSIBLE = [
    Permutation(
        "llama",
        "query heads across groups",
        attention(
            LLAMA, heads=np.array(SWAP_ACROSS), queries=heads_order(SWAP_ACROSS, 4), mixed=heads_order(SWAP_ACROSS, 4)
        ),
    ),
    Permutation(
        "llama",
        "dimensions of a rotary pair",
        attention(LLAMA, queries=inside_heads([2, 1, 0, 3], 4), keys=inside_heads([2, 1, 0, 3], 2)),
    ),
    Permutation(
        "qwen3",
        "whole rotary pairs",
        attention(LLAMA, queries=inside_heads([1, 0, 3, 2], 4), keys=inside_heads([1, 0, 3, 2], 2)),
    ),
    Permutation("gpt2", "residual stream of one block only", lambda _: {f"{GPT2}.stream": np.roll(np.arange(12), 1)}),
    Permutation("llama", "residual stream of one block only", lambda _: {f"{LLAMA}.stream": np.roll(np.arange(12), 1)}),
    Permutation("gpt2", "query dimensions without the keys", attention(GPT2, queries=inside_heads(DIMENSIONS, 3))),
    Permutation(
        "vit", "stream after the last layer only", lambda _: {"vit.layers.1.mlp.stream": np.roll(np.arange(12), 1)}
    ),
    Permutation("lstm", "one gate's units", lambda _: {"recurrent.l0.forget": np.roll(np.arange(5), 1)}),
    Permutation(
        "gru_bidirectional",
        "hidden units without their gates",
        lambda _: {"recurrent.l0.hidden": np.append(np.roll(np.arange(5), 1), np.arange(5, 10))},
    ),
    Permutation("residual_net", "one side of a shortcut", lambda _: {"conv1": np.roll(np.arange(6), 1)}),
    Permutation(
        "bert_mlm",
        "transformed units without the table",
        lambda _: {"cls.predictions.transform.stream": np.roll(np.arange(12), 1)},
    ),
]


def image_of(graph: SmallGraph, permutation: Permutation) -> Ints:
    moves = permutation.moves(graph)
    exchanged = moves.pop("swap", None)
    image = graph.moved(moves)
    if exchanged is not None:
        for part in ("hidden", "up"):
            first, second = (graph.layer(f"model.layers.0.mlp.expert{expert}.{part}") for expert in exchanged)
            image[first], image[second] = second, first
    return image


def outputs(model: SmallModel, graph: SmallGraph, image: Ints) -> tuple[torch.Tensor, torch.Tensor]:
    vector_P = model.random_vectors(np.random.default_rng(3), 1)[:, 0]
    return model.output(vector_P), model.output(graph.permuted(image, vector_P))


@pytest.mark.parametrize("permutation", ADMISSIBLE, ids=str)
def test_an_admissible_permutation_is_an_automorphism(permutation: Permutation) -> None:
    model = SMALL_MODELS[permutation.model]()
    graph = SmallGraph(model.topology())
    image = image_of(graph, permutation)
    assert (image != np.arange(len(image))).any()
    assert graph.is_automorphism(image)
    before, after = outputs(model, graph, image)
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("permutation", INADMISSIBLE, ids=str)
def test_an_inadmissible_permutation_changes_the_output(permutation: Permutation) -> None:
    model = SMALL_MODELS[permutation.model]()
    graph = SmallGraph(model.topology())
    image = image_of(graph, permutation)
    assert not graph.is_automorphism(image)
    before, after = outputs(model, graph, image)
    assert (after - before).abs().max() > 1e-4 * before.std()


def test_exchanged_lstm_gates_change_the_output() -> None:
    model = SMALL_MODELS["lstm"]()
    graph = SmallGraph(model.topology())
    image = np.arange(graph.num_nodes)
    suffixes = ("", ".role")
    names = [(f"recurrent.l0.input{end}", f"recurrent.l0.forget{end}") for end in suffixes]
    names += [(f"recurrent.bias_{kind}_l0.input", f"recurrent.bias_{kind}_l0.forget") for kind in ("ih", "hh")]
    for first, second in names:
        image[graph.layer(first)], image[graph.layer(second)] = graph.layer(second), graph.layer(first)
    assert not graph.is_automorphism(image), "gates are boundary nodes' neighbours"
    before, after = outputs(model, graph, image)
    assert (after - before).abs().max() > 1e-4 * before.std()


@pytest.mark.parametrize("name", sorted(SMALL_MODELS))
def test_every_element_lies_on_exactly_one_edge(name: str) -> None:
    model = SMALL_MODELS[name]()
    for layout in ("symmetric", "official") if name in ("gpt2", "qwen3", "llama", "llama_tied") else ("symmetric",):
        element_EF = SmallGraph(model.topology(layout)).element_EF
        np.testing.assert_array_equal(np.sort(element_EF[element_EF >= 0]), np.arange(model.manifest.num_elements))
