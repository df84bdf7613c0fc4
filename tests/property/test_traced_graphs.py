"""Networks whose graphs used to be too symmetric, and their siblings: each is drawn right, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from sidecast.errors import ConfigError
from sidecast.graphs.automorphisms import SmallGraph
from tests.support.symmetric_models import ENCODER, SmallModel, _chain, hugging_face, token_ids, traced

functional = nn.functional
RIGHT = ""
"""In place of what a refusal says."""


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def net(forward: Callable[..., Any], **parts: nn.Module) -> nn.Module:
    module: nn.Module = type("Net", (nn.Module,), {"forward": forward})()
    for name, part in parts.items():
        setattr(module, name, part)
    return module


def plain(num_inputs: int, num_outputs: int) -> nn.Linear:
    """Without the bias, whose node would tell the layer from others."""
    return nn.Linear(num_inputs, num_outputs, bias=False)


def with_tied_output() -> SmallModel:
    recurrent = nn.LSTM(6, 6, batch_first=True)
    module = net(lambda s, t: s.o(s.r(s.e(t))[0]), e=nn.Embedding(11, 6), r=recurrent, o=nn.Linear(6, 11))
    module.o.weight = module.e.weight
    return traced(module, token_ids(11))


def with_shared_weight() -> SmallModel:
    module = net(lambda s, x: s.o(torch.tanh(s.b(torch.tanh(s.a(x))))), a=plain(6, 6), b=plain(6, 6), o=plain(6, 2))
    module.b.weight = module.a.weight
    return traced(module, random(3, 6))


def with_mask() -> SmallModel:
    module = net(lambda s, x: s.o(s.a(x) * s.mask), a=nn.Linear(5, 8), o=nn.Linear(8, 3))
    module.register_buffer("mask", torch.arange(8.0))
    return traced(module, random(3, 5))


def two(combine: Callable[[Any, Tensor, Tensor], Tensor], width: int = 8, **parts: nn.Module) -> SmallModel:
    """Two branches without biases, combined and projected."""
    parts = {"a": plain(5, 8), "b": plain(5, 8), "o": plain(width, 3), **parts}
    return traced(net(lambda s, x: s.o(combine(s, s.a(x), s.b(x))), **parts), random(3, 5))


def conv_then(middle: Callable[[Any, Tensor], Tensor], head: nn.Module, **parts: nn.Module) -> SmallModel:
    """A convolution over eight places to eight channels, something, and a head."""
    return traced(net(lambda s, x: s.o(middle(s, s.c(x))), c=nn.Conv1d(2, 8, 1), o=head, **parts), random(2, 2, 8))


def linear_then(middle: Callable[[Any, Tensor], Tensor], head: nn.Module, **parts: nn.Module) -> SmallModel:
    """A linear layer over the features of eight places to eight units, something, and a head."""
    return traced(net(lambda s, x: s.o(middle(s, s.c(x))), c=nn.Linear(3, 8), o=head, **parts), random(2, 8, 3))


def heads_then(middle: Callable[[Any, Tensor], Tensor], **parts: nn.Module) -> SmallModel:
    """A linear layer to three heads of four dimensions, something that keeps both, and a head."""
    parts = {"a": nn.Linear(5, 12), "o": nn.Linear(12, 2), **parts}
    forward = lambda s, x: s.o(middle(s, s.a(x).unflatten(1, (3, 4))).flatten(1))  # noqa: E731
    return traced(net(forward, **parts), random(6, 5))


LACKS = "has a symmetry that the model lacks"

KNOWN: dict[str, tuple[Callable[[], SmallModel], str]] = {
    "gated unit without bias": (lambda: two(lambda s, a, b: functional.silu(a) * b), RIGHT),
    "sum of an activated and a plain unit": (lambda: two(lambda s, a, b: torch.relu(a) + b), RIGHT),
    "embedding, flatten, linear": (
        lambda: traced(
            net(lambda s, t: s.h(s.e(t).flatten(1)), e=nn.Embedding(11, 4), h=nn.Linear(28, 5)), token_ids(11)
        ),
        RIGHT,
    ),
    "tied table and LSTM": (with_tied_output, RIGHT),
    "initial state": (
        lambda: traced(
            net(
                lambda s, x, z: s.o(s.r(x, s.c(z))[0]),
                c=nn.Linear(4, 5),
                r=nn.GRU(3, 5, batch_first=True),
                o=nn.Linear(5, 2),
            ),
            random(2, 6, 3),
            random(1, 2, 4),
        ),
        RIGHT,
    ),
    "state of a lower layer": (
        lambda: traced(
            net(lambda s, x: s.o(s.r(x)[1][0]), r=nn.GRU(3, 5, 2, batch_first=True), o=nn.Linear(5, 2)), random(2, 6, 3)
        ),
        RIGHT,
    ),
    "mean over layers' states": (
        lambda: traced(
            net(lambda s, x: s.o(s.r(x)[1].mean(0)), r=nn.GRU(3, 5, 2, batch_first=True), o=nn.Linear(5, 2)),
            random(2, 6, 3),
        ),
        RIGHT,
    ),
    "state of the last layer": (
        lambda: traced(
            net(lambda s, x: s.o(s.r(x)[1][-1]), r=nn.GRU(3, 5, 2, batch_first=True), o=nn.Linear(5, 2)),
            random(2, 6, 3),
        ),
        RIGHT,
    ),
    "local response norm": (
        lambda: conv_then(lambda s, y: s.n(y), nn.Conv1d(8, 2, 1), n=nn.LocalResponseNorm(3, alpha=1.0)),
        RIGHT,
    ),
    "GLU between convolutions": (
        lambda: conv_then(lambda s, y: s.n(y), nn.Conv1d(4, 2, 1), n=nn.GLU(1)),
        RIGHT,
    ),
    "linear over positions": (lambda: conv_then(lambda s, y: y.relu(), nn.Linear(8, 3)), RIGHT),
    "linear over flattened positions": (lambda: conv_then(lambda s, y: y.flatten(2), nn.Linear(8, 3)), RIGHT),
    "convolution over tokens": (
        lambda: traced(net(lambda s, t: s.c(s.e(t)), e=nn.Embedding(11, 4), c=nn.Conv1d(7, 5, 1)), token_ids(11)),
        RIGHT,
    ),
    "mean over channels": (lambda: conv_then(lambda s, y: y.mean(1), nn.Linear(8, 3)), RIGHT),
    "layer norm over as many positions as channels": (
        lambda: conv_then(lambda s, y: s.n(y), nn.Conv1d(8, 2, 1), n=nn.LayerNorm(8)),
        RIGHT,
    ),
    "padding of features": (
        lambda: linear_then(lambda s, y: s.p(y), nn.Linear(16, 3), p=nn.ConstantPad1d((3, 5), 1.0)),
        RIGHT,
    ),
    "chain, two groups of channels": (
        lambda: _chain(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 4, 1), shape=(2, 3, 8, 8)),
        LACKS,
    ),
    "chain, grouped first": (
        lambda: _chain(nn.Conv2d(4, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 4, 1), shape=(2, 4, 8, 8)),
        LACKS,
    ),
    "chain, transposed": (
        lambda: _chain(
            nn.Conv2d(3, 8, 1), nn.ConvTranspose2d(8, 8, 2, 2), nn.ReLU(), nn.Conv2d(8, 2, 1), shape=(2, 3, 4, 4)
        ),
        LACKS,
    ),
    "chain, shuffled": (
        lambda: _chain(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.ChannelShuffle(2), nn.Conv2d(8, 2, 1), shape=(2, 3, 4, 4)),
        LACKS,
    ),
    "chain, weight norm": (
        lambda: _chain(nn.utils.parametrizations.weight_norm(plain(6, 6)), nn.ReLU(), plain(6, 6), shape=(4, 6)),
        "is a factor of a weight",
    ),
    "bare Llama": (
        lambda: hugging_face(
            "LlamaModel",
            transformers.LlamaConfig(
                hidden_size=12,
                intermediate_size=9,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=4,
                vocab_size=11,
            ),
            token_ids(11),
        ),
        RIGHT,
    ),
    "bare GPT-2": (
        lambda: hugging_face(
            "GPT2Model",
            transformers.GPT2Config(n_embd=12, n_layer=2, n_head=3, n_inner=9, vocab_size=11, n_positions=8),
            token_ids(11),
        ),
        RIGHT,
    ),
    "bare BERT": (
        lambda: hugging_face(
            "BertModel", transformers.BertConfig(**ENCODER, vocab_size=11, max_position_embeddings=8), token_ids(11)
        ),
        RIGHT,
    ),
    "bare ViT": (
        lambda: hugging_face(
            "ViTModel", transformers.ViTConfig(**ENCODER, image_size=8, patch_size=4), random(2, 3, 8, 8)
        ),
        RIGHT,
    ),
}

SIBLINGS: dict[str, tuple[Callable[[], SmallModel], str]] = {
    "difference": (lambda: two(lambda s, a, b: a - b), RIGHT),
    "quotient": (lambda: two(lambda s, a, b: a / (b * b + 1)), RIGHT),
    "weighted sum": (lambda: two(lambda s, a, b: torch.add(a, b, alpha=2)), RIGHT),
    "two slopes of one activation": (
        lambda: two(lambda s, a, b: functional.leaky_relu(a, 0.1) * functional.leaky_relu(b, 0.4)),
        RIGHT,
    ),
    "two slopes of one activation module": (
        lambda: two(lambda s, a, b: s.f(a) * s.g(b), f=nn.LeakyReLU(0.1), g=nn.LeakyReLU(0.4)),
        RIGHT,
    ),
    "branches that are activated differently": (
        lambda: two(lambda s, a, b: s.c(torch.relu(a)) + s.d(torch.tanh(b)), c=plain(8, 8), d=plain(8, 8)),
        RIGHT,
    ),
    "product and sum of branches": (
        lambda: traced(
            net(
                lambda s, x: s.o(s.e(s.a(x) * s.b(x)) + s.f(s.c(x) + s.d(x))),
                **{name: plain(5, 8) for name in "abcd"},
                e=plain(8, 8),
                f=plain(8, 8),
                o=plain(8, 3),
            ),
            random(3, 5),
        ),
        RIGHT,
    ),
    "alike branches": (lambda: two(lambda s, a, b: torch.relu(a) * torch.relu(b)), RIGHT),
    "concatenation": (lambda: two(lambda s, a, b: torch.cat([a, b], 1), width=16), RIGHT),
    "repetition": (lambda: two(lambda s, a, b: (a + b).repeat(1, 2), width=16), RIGHT),
    "einsum": (lambda: two(lambda s, a, b: torch.einsum("bi,bj->bi", a, b)), RIGHT),
    "product of matrices": (lambda: two(lambda s, a, b: a @ (b.t() @ b)), RIGHT),
    "running sum": (lambda: two(lambda s, a, b: torch.cumsum(a + b, 1)), RIGHT),
    "complex view": (
        lambda: two(lambda s, a, b: torch.view_as_real(torch.view_as_complex((a + b).reshape(3, 4, 2))).flatten(1)),
        RIGHT,
    ),
    "two layers with one weight": (with_shared_weight, RIGHT),
    "mask over features": (with_mask, RIGHT),
    "batch norm over positions": (
        lambda: linear_then(lambda s, y: s.n(y), nn.Linear(8, 2), n=nn.BatchNorm1d(8)),
        RIGHT,
    ),
    "pooling over features": (
        lambda: linear_then(lambda s, y: s.p(y), nn.Linear(8, 2), p=nn.MaxPool1d(3, stride=1, padding=1)),
        RIGHT,
    ),
    "flattened positions of a linear layer": (lambda: linear_then(lambda s, y: y.flatten(1), nn.Linear(64, 2)), RIGHT),
    "flattened positions of a convolution": (lambda: conv_then(lambda s, y: y.flatten(1), nn.Linear(64, 2)), RIGHT),
    "upsampled features": (
        lambda: linear_then(lambda s, y: s.p(y), nn.Linear(16, 3), p=nn.Upsample(scale_factor=2)),
        RIGHT,
    ),
    "resampled features": (
        lambda: linear_then(lambda s, y: functional.interpolate(y, size=8, mode="linear"), nn.Linear(8, 3)),
        RIGHT,
    ),
    "blurred features": (
        lambda: linear_then(lambda s, y: functional.avg_pool1d(y, 3, 1, 1), nn.Linear(8, 3)),
        RIGHT,
    ),
    "recurrence over channels": (
        lambda: conv_then(lambda s, y: s.r(y)[0], nn.Linear(5, 2), r=nn.GRU(8, 5, batch_first=True)),
        RIGHT,
    ),
    "reordered units of a recurrent layer": (
        lambda: traced(
            net(
                lambda s, x: s.o(s.r(x)[0][:, :, [1, 0, 2, 3, 4]]),
                r=nn.LSTM(3, 5, batch_first=True),
                o=nn.Linear(5, 2),
            ),
            random(2, 6, 3),
        ),
        RIGHT,
    ),
    "recurrent cell": (
        lambda: linear_then(lambda s, y: s.r(y[:, 0]), nn.Linear(5, 2), r=nn.GRUCell(8, 5)),
        RIGHT,
    ),
    "shuffled pixels": (
        lambda: traced(
            net(lambda s, x: s.b(s.p(s.a(x))), a=nn.Conv2d(2, 8, 1), p=nn.PixelShuffle(2), b=nn.Conv2d(2, 3, 1)),
            random(1, 2, 4, 4),
        ),
        RIGHT,
    ),
    "cell state beside the outputs": (
        lambda: traced(
            net(lambda s, x: s.o(s.r(x)[1][1][-1]), r=nn.LSTM(3, 5, 2, batch_first=True), o=nn.Linear(5, 2)),
            random(2, 6, 3),
        ),
        RIGHT,
    ),
    "states of all layers returned": (
        lambda: traced(net(lambda s, x: s.r(x), r=nn.GRU(3, 5, 2, batch_first=True)), random(2, 6, 3)),
        RIGHT,
    ),
    "chain, norm over positions": (
        lambda: _chain(nn.Conv1d(2, 8, 1), nn.LayerNorm(8), nn.ReLU(), nn.Conv1d(8, 3, 1), shape=(2, 2, 8)),
        LACKS,
    ),
    "weights of heads": (lambda: heads_then(lambda s, y: y.softmax(1)), RIGHT),
    "logarithms of weights of heads": (lambda: heads_then(lambda s, y: y.log_softmax(1)), RIGHT),
    "running sum over heads": (lambda: heads_then(lambda s, y: y.cumsum(1)), RIGHT),
    "running product over heads": (lambda: heads_then(lambda s, y: y.cumprod(1)), RIGHT),
    "reversed heads": (lambda: heads_then(lambda s, y: y + y.flip(1)), RIGHT),
    "rolled heads": (lambda: heads_then(lambda s, y: y + y.roll(1, 1)), RIGHT),
    "reordered heads": (lambda: heads_then(lambda s, y: y + y[:, [2, 0, 1]]), RIGHT),
    "heads that are added to heads": (
        lambda: heads_then(lambda s, y: y + s.m(y.transpose(1, 2)).transpose(1, 2), m=nn.Linear(3, 3)),
        RIGHT,
    ),
    "heads that are convolved with heads": (
        lambda: heads_then(
            lambda s, y: y + s.m(y.transpose(1, 2).flatten(0, 1)[:, :, None])[:, :, 0].unflatten(0, (6, 4)).mT,
            m=nn.Conv1d(3, 3, 1),
        ),
        RIGHT,
    ),
    "attention between heads": (
        lambda: heads_then(lambda s, y: y + (y @ y.mT).softmax(-1) @ y),
        RIGHT,
    ),
    "chain, gated": (lambda: _chain(nn.Linear(6, 8), nn.Softmax(0), nn.Linear(8, 3), shape=(4, 6)), RIGHT),
}


def largest_change(model: SmallModel) -> float:
    """Of the output under random automorphisms, in standard deviations of it."""
    graph, rng, change = SmallGraph(model.topology()), np.random.default_rng(0), 0.0
    for _ in range(4):
        vector_P = model.random_vectors(rng, 1)[:, 0]
        permuted_P = graph.permuted(graph.random_automorphism(rng), vector_P)
        before, after = (torch.cat([*map(torch.ravel, _tensors(model, vector))]) for vector in (vector_P, permuted_P))
        change = max(change, float((after - before).abs().max() / before.std()))
    return change


def _tensors(model: SmallModel, vector_P: Any) -> tuple[Tensor, ...]:
    output = model.output(vector_P)
    return output if isinstance(output, tuple) else (output,)


@pytest.mark.parametrize("name", [*KNOWN, *SIBLINGS])
def test_graph_is_right_or_refused(name: str) -> None:
    make, refusal = {**KNOWN, **SIBLINGS}[name]
    if refusal != RIGHT:
        with pytest.raises(ConfigError, match=refusal):
            make().topology()
        return
    assert largest_change(make()) < 1e-8


FREE = {
    "embedding, flatten, linear": 4,
    "initial state": 5,
    "state of a lower layer": 5,
    "GLU between convolutions": 4,
    "difference": 8,
    "concatenation": 8,
    "einsum": 8,
    "recurrent cell": 5,
    "batch norm over positions": 8,
    "weights of heads": 4,
    "running sum over heads": 4,
    "heads that are added to heads": 4,
}
"""Networks that have no graph of layers, and the size of a set of neurons that may be permuted in each."""


@pytest.mark.parametrize("name", FREE)
def test_axes_that_can_be_followed_are_free(name: str) -> None:
    make, _ = {**KNOWN, **SIBLINGS}[name]
    config = make().manifest.config
    assert config["model_type"] == "axis_graph"
    assert FREE[name] in {each["size"] for each in config["sets"] if not each["is_held"]}
