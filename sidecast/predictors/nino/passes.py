"""NiNo as passes over the parts of a graph: the sums of each convolution, and at last the predicted changes.

Shape suffixes: V nodes, D hidden, L positional encoding, X edge features, S source nodes, T target nodes,
F kernel elements.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad, silu

from sidecast.predictors.nino.block_parts import BlockPart
from sidecast.predictors.nino.features import FeatureReader
from sidecast.predictors.nino.fusion import Affine, FusedNino, HiddenLayer
from sidecast.predictors.nino.kernels import Kernels, Layer
from sidecast.predictors.passes import Found, PartContext, WritingPass
from sidecast.predictors.scaling_pass import SCALES, found_scale
from sidecast.predictors.step_length import StepLength, step_length
from sidecast.scaling import EPSILON

_ROWS = 4_096
"""Nodes updated at once, so that a node update needs a few megabytes however many nodes there are."""


def node_key(layer: int) -> str:
    """Key of the node features after so many convolutions, (V, D) fp32."""
    return f"nodes{layer}"


class FirstConvolutionPass:
    """The first convolution, whose messages are bilinear in edge features and positional encoding.

    No hidden vector of an edge is needed: for each target, the sums over its sources of feature x encoding hold all.

    Args:
        network: The network.
        reader: Gives the edge features.
        lpe_VL: Positional encoding of the nodes.
        degree_V: Incoming edges of the nodes.
    """

    def __init__(self, network: FusedNino, reader: FeatureReader, lpe_VL: Tensor, degree_V: Tensor) -> None:
        self._network = network
        self._reader = reader
        self._degree_V = degree_V
        # The constant column makes the sums hold the plain sums of the features too.
        self._encoding_VL = pad(lpe_VL, (0, 1), value=1.0)
        conv = network.convolutions[0]
        assert network.node_input is not None
        self._inputs = inputs = network.node_input
        nodes = Affine(torch.cat([inputs.weight, inputs.bias[None]]), torch.zeros_like(inputs.bias))
        self._target = Affine(nodes.weight @ conv.target.weight, conv.target.bias)
        self._source_LD = nodes.weight @ conv.source.weight
        self._gain_XLD = conv.scale.weight[:, None] * self._source_LD

    def zeros(self, context: PartContext) -> Tensor:
        return node_zeros(self._network, self._degree_V, context)

    def map(self, part: BlockPart, context: PartContext) -> Tensor:
        conv = self._network.convolutions[0]
        features_XTS = self._reader.features(part, context)
        num_features = len(features_XTS)
        encoding_SL = self._encoding_VL[part.sources]
        if part.paired:
            products_XTL = features_XTS * encoding_SL
            encoding_sum_TL = encoding_SL
        else:
            products_XTL = features_XTS @ encoding_SL
            encoding_sum_TL = encoding_SL.sum(0, keepdim=True)
        sums_TX = products_XTL[..., -1].T
        target_TD = self._target(self._encoding_VL[part.targets])
        scale, shift = conv.scale, conv.shift
        scale_bias_D, shift_bias_D = scale.bias[part.edge_type], shift.bias[part.edge_type]
        message_TD = products_XTL.transpose(0, 1).flatten(1) @ self._gain_XLD[:num_features].flatten(0, 1)
        message_TD += (sums_TX @ scale.weight[:num_features] + num_sources_each(part) * scale_bias_D) * target_TD
        message_TD += (encoding_sum_TL @ self._source_LD) * scale_bias_D
        message_TD += sums_TX @ shift.weight[:num_features] + num_sources_each(part) * shift_bias_D
        return message_TD

    def add(self, part: BlockPart, contribution: Tensor, sums: Tensor) -> None:
        part.add_to(sums, contribution)

    def finish(self, sums: Tensor, context: PartContext) -> Found:
        def nodes_before(rows: slice) -> Tensor:
            return self._inputs(self._encoding_VL[rows, :-1])

        update_nodes(self._network, 0, nodes_before, sums, self._degree_V, context)
        return {SCALES: context.found[SCALES], node_key(1): sums}


class ConvolutionPass:
    """A later convolution, whose messages need the hidden vectors of the edges, tile by tile.

    Args:
        network: The network.
        layer: Which convolution, from 1.
        reader: Gives the edge features.
        degree_V: Incoming edges of the nodes.
        kernels: Does the tiles.
    """

    def __init__(
        self, network: FusedNino, layer: int, reader: FeatureReader, degree_V: Tensor, kernels: Kernels
    ) -> None:
        self._network = network
        self._layer = layer
        self._reader = reader
        self._degree_V = degree_V
        self._kernels = kernels

    def zeros(self, context: PartContext) -> Tensor:
        return node_zeros(self._network, self._degree_V, context)

    def map(self, part: BlockPart, context: PartContext) -> Tensor:
        conv = self._network.convolutions[self._layer]
        nodes_VD = context.found[node_key(self._layer)]
        layers = prepare_layers(self._network.hidden[: self._layer], part, context)
        source_SD = conv.source(nodes_VD[part.sources])
        target_TD = conv.target(nodes_VD[part.targets])
        features_XTS = self._reader.features(part, context)
        gain_SD = torch.ones_like(source_SD[:1]) if part.paired else source_SD
        hidden_TD, gained_TD = self._kernels.message_sums(features_XTS, layers, conv.scale.weight, gain_SD)
        num_sources = num_sources_each(part)
        message_TD = (hidden_TD @ conv.scale.weight + num_sources * conv.scale.bias) * target_TD
        message_TD += hidden_TD @ conv.shift.weight + num_sources * conv.shift.bias
        if part.paired:
            message_TD += (gained_TD + conv.scale.bias) * source_SD
        else:
            message_TD += gained_TD + source_SD.sum(0) * conv.scale.bias
        return message_TD

    def add(self, part: BlockPart, contribution: Tensor, sums: Tensor) -> None:
        part.add_to(sums, contribution)

    def finish(self, sums: Tensor, context: PartContext) -> Found:
        nodes_VD = context.found[node_key(self._layer)]
        update_nodes(self._network, self._layer, lambda rows: nodes_VD[rows], sums, self._degree_V, context)
        return {**context.found, node_key(self._layer + 1): sums}


class ChangePass(WritingPass):
    """The last pass: writes the predicted change of every parameter.

    Args:
        network: The network.
        horizon_intervals: k.
        reader: Gives the edge features.
        upd_scale: Share of the change that is used.
        kernels: Does the tiles.
        by_element: Each kernel element is a scalar parameter of its own (WNN+).
    """

    def __init__(
        self,
        network: FusedNino,
        horizon_intervals: int,
        reader: FeatureReader,
        upd_scale: StepLength,
        kernels: Kernels,
        *,
        by_element: bool = False,
    ) -> None:
        self._network = network
        self._output = network.output_at(horizon_intervals)
        self._reader = reader
        self._upd_scale = upd_scale
        self._kernels = kernels
        self._by_element = by_element

    def map(self, part: BlockPart, context: PartContext) -> None:
        if part.view is None:
            return
        layers = prepare_layers(self._network.hidden, part, context)
        features_XTS = self._reader.features(part, context)
        num_elements, context_len = part.num_kernel_elements, self._network.config.context_len
        if self._by_element:
            change_TSF = torch.stack(
                [
                    self._kernels.changes(element_CTS, layers, self._output)[..., 0]
                    for element_CTS in features_XTS.split(context_len)
                ],
                dim=-1,
            )
        else:
            output = Affine(self._output.weight[:, :num_elements], self._output.bias[:num_elements])
            change_TSF = self._kernels.changes(features_XTS, layers, output)
        scale = found_scale(part, context)
        newest_TSF = features_XTS[context_len - 1 :: context_len].permute(1, 2, 0)
        change_TSF *= step_length(self._upd_scale, part.view.fqn) * scale.std
        # Scaled back without the epsilon, the newest state itself moves by that much.
        change_TSF.sub_(newest_TSF, alpha=EPSILON)
        part.write(change_TSF, context.out, context.manifest.offsets[part.view.fqn])


def num_sources_each(part: BlockPart) -> int:
    """Edges of the part that go to each of its targets."""
    return part.grid[1]


def prepare_layers(hidden: Sequence[HiddenLayer], part: BlockPart, context: PartContext) -> list[Layer]:
    """Hidden layers on the edges of a part, with the contributions of its nodes."""
    layers = []
    for depth, layer in enumerate(hidden):
        edge = layer.edge
        bias_D = edge.bias[part.edge_type] if depth == 0 else edge.bias
        weight = edge.weight
        if depth == 0:
            weight = weight[: part.num_kernel_elements * (len(context.states))]
        if layer.source is None or layer.target is None:
            layers.append(Layer(weight, None, bias_D[None]))
            continue
        nodes_VD = context.found[node_key(depth + 1)]
        source_SD = layer.source(nodes_VD[part.sources])
        target_TD = layer.target(nodes_VD[part.targets]) + bias_D
        if part.paired:
            layers.append(Layer(weight, None, target_TD + source_SD))
        else:
            layers.append(Layer(weight, source_SD, target_TD))
    return layers


def node_zeros(network: FusedNino, degree_V: Tensor, context: PartContext) -> Tensor:
    """Message sums of all nodes before any message, (V, D) fp32, on the device of the degrees."""
    shape = (len(degree_V), network.config.hidden_dim)
    return context.workspace.zeros(*shape) if degree_V.device.type == "cpu" else degree_V.new_zeros(shape)


def update_nodes(
    network: FusedNino,
    layer: int,
    nodes_before: Callable[[slice], Tensor],
    sums_VD: Tensor,
    degree_V: Tensor,
    context: PartContext,
) -> None:
    """Turns the message sums of all nodes into their next features, in place."""
    conv = network.convolutions[layer]
    for start in range(0, len(sums_VD), _ROWS):
        rows = slice(start, start + _ROWS)
        mean_RD = sums_VD[rows] / degree_V[rows, None]
        sums_VD[rows] = silu(conv.keep(nodes_before(rows)) + mean_RD @ conv.mean.weight)
        context.workspace.trim()
