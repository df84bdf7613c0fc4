"""NiNo's linear maps, composed once so that no edge ever needs its hidden vector twice.

Everything that is linear between two non-linearities becomes one matrix. Composed in fp64, used in fp32.

Shape suffixes: D hidden, X edge features (kernel elements x context), L positional encoding, F kernel elements.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sidecast.predictors.nino.config import NinoConfig
from sidecast.predictors.nino.weights import NinoWeights


@dataclass(frozen=True)
class Affine:
    """x -> x @ weight + bias; one bias for all edges, or one for each edge type (rows)."""

    weight: Tensor
    bias: Tensor

    @classmethod
    def named(cls, tensors: Mapping[str, Tensor], name: str) -> Affine:
        return cls(tensors[f"{name}.weight"].double().T, tensors[f"{name}.bias"].double())

    def then(self, after: Affine) -> Affine:
        """Both as one map."""
        return Affine(self.weight @ after.weight, self.bias @ after.weight + after.bias)

    def rows(self, first: int, last: int) -> Affine:
        """The map of some inputs only, without the bias."""
        return Affine(self.weight[first:last], torch.zeros_like(self.bias))

    def columns(self, first: int, last: int) -> Affine:
        """Some outputs of the map."""
        return Affine(self.weight[:, first:last], self.bias[..., first:last])

    def single(self) -> Affine:
        """The map in fp32, laid out for products."""
        return Affine(self.weight.float().contiguous(), self.bias.float().contiguous())

    def to(self, device: torch.device) -> Affine:
        return Affine(self.weight.to(device), self.bias.to(device))

    def __call__(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


@dataclass(frozen=True)
class Convolution:
    """One convolution, as maps of what its edges and nodes have.

    Attributes:
        scale: Scale of a message: from edge features (first convolution) or from the hidden vector of the edge.
        shift: Shift of a message, likewise.
        target: pre_nns on the target node, with its bias.
        source: pre_nns on the source node.
        keep: post_nns and lin on the node itself, with their bias.
        mean: post_nns and lin on the mean message.
    """

    scale: Affine
    shift: Affine
    target: Affine
    source: Affine
    keep: Affine
    mean: Affine

    def to(self, device: torch.device) -> Convolution:
        return Convolution(**{name: affine.to(device) for name, affine in vars(self).items()})


@dataclass(frozen=True)
class HiddenLayer:
    """One non-linear layer on an edge: SiLU(edge(input) + source(x_source) + target(x_target)).

    Attributes:
        edge: Maps edge features (first layer; a bias for each edge type) or the previous hidden vector.
        source: Maps the features of the source node; None in the output network.
        target: Maps the features of the target node; None in the output network.
    """

    edge: Affine
    source: Affine | None = None
    target: Affine | None = None

    def to(self, device: torch.device) -> HiddenLayer:
        ends = [end if end is None else end.to(device) for end in (self.source, self.target)]
        return HiddenLayer(self.edge.to(device), *ends)


@dataclass(frozen=True)
class FusedNino:
    """A NiNo network with its linear maps composed.

    Attributes:
        config: Hyper-parameters.
        node_input: Node features from the positional encoding; None without convolutions.
        convolutions: Those that the output depends on: all but the last.
        hidden: The edge updates, and then the hidden layer of the output network.
        output: Last layer, all horizons: column ``f * K + k - 1``.
    """

    config: NinoConfig
    node_input: Affine | None
    convolutions: tuple[Convolution, ...]
    hidden: tuple[HiddenLayer, ...]
    output: Affine

    def to(self, device: torch.device) -> FusedNino:
        """The network on a device."""
        return FusedNino(
            self.config,
            None if self.node_input is None else self.node_input.to(device),
            tuple(convolution.to(device) for convolution in self.convolutions),
            tuple(layer.to(device) for layer in self.hidden),
            self.output.to(device),
        )

    def output_at(self, horizon_intervals: int) -> Affine:
        """The last layer at one horizon: one column for each kernel element."""
        return Affine(
            self.output.weight[:, horizon_intervals - 1 :: self.config.max_horizon].contiguous(),
            self.output.bias[horizon_intervals - 1 :: self.config.max_horizon].contiguous(),
        )


def fuse(weights: NinoWeights) -> FusedNino:
    """Composes the linear maps of a NiNo network.

    Source: NiNo (arXiv 2409.04434), section 4.3, for what is composed.
    """
    config, tensors = weights.config, weights.tensors
    dim = config.hidden_dim
    projection = Affine.named(tensors, "edge_proj.fc.0")
    # Of the edge as it enters a layer: a function of the features first, of the last hidden vector later.
    edge = Affine(projection.weight, projection.bias + tensors["layer_embed.weight"].double())
    convolutions, hidden = [], []
    for layer in range(config.num_layers - 1):
        name = f"gnn.convs.{layer}"
        modulation = edge.then(Affine.named(tensors, f"{name}.edge_encoder"))
        pre = Affine.named(tensors, f"{name}.pre_nns.0.0")
        post = Affine.named(tensors, f"{name}.post_nns.0.0").then(Affine.named(tensors, f"{name}.lin"))
        convolutions.append(
            Convolution(
                scale=modulation.columns(0, dim).single(),
                shift=modulation.columns(dim, 2 * dim).single(),
                target=Affine(pre.weight[:dim], pre.bias).single(),
                source=pre.rows(dim, 2 * dim).single(),
                keep=Affine(post.weight[:dim], post.bias).single(),
                mean=post.rows(dim, 2 * dim).single(),
            )
        )
        update = f"gnn.edge_update.{layer}"
        hidden.append(
            HiddenLayer(
                edge=edge.then(Affine.named(tensors, f"{update}.lin_e")).single(),
                source=Affine.named(tensors, f"{update}.lin_s").single(),
                target=Affine.named(tensors, f"{update}.lin_t").single(),
            )
        )
        edge = Affine.named(tensors, f"{update}.lin1")
    hidden.append(HiddenLayer(edge=edge.then(Affine.named(tensors, "edge_out.fc.0")).single()))
    return FusedNino(
        config,
        Affine.named(tensors, "node_proj.fc.0").single(),
        tuple(convolutions),
        tuple(hidden),
        Affine.named(tensors, "edge_out.fc.2").single(),
    )


def fuse_mlp(weights: NinoWeights) -> FusedNino:
    """Composes the linear maps of a WNN+ network: a NiNo without convolutions."""
    config, tensors = weights.config, weights.tensors
    projection = Affine.named(tensors, "edge_proj.fc.0")
    edge = Affine(projection.weight, projection.bias + tensors["layer_embed.weight"].double())
    layers = [Affine.named(tensors, f"edge_mlp.fc.{2 * layer}") for layer in range(config.num_mlp_layers)]
    hidden = [edge.then(layers[0]), *layers[1:-1]]
    return FusedNino(
        config,
        None,
        (),
        tuple(HiddenLayer(edge=layer.single()) for layer in hidden),
        layers[-1].single(),
    )
