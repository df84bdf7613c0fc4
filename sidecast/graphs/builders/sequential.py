"""Fully connected and convolutional chains without branches, read from shapes alone.

A matrix or kernel begins a layer; the vectors after it (bias, norm weight and bias) attach to that layer's outputs.
Shapes do not tell grouped or transposed convolutions, nor norms over some of the channels: ``manifest_of_chain`` does.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from sidecast.errors import ConfigError
from sidecast.graphs.assembler import MatrixSlice, TopologyAssembler
from sidecast.graphs.builder import GraphBuilder
from sidecast.graphs.model_config import ModelConfig
from sidecast.graphs.topology import EdgeType, NodeRange
from sidecast.manifest import ParameterSpec

_REPARAMETRISED = re.compile(r"\.parametrizations\.|(^|\.)weight_(g|v|orig)$|(^|\.)original\d*$")


@dataclass(frozen=True)
class _Layer:
    """A matrix or kernel and the vectors on its outputs."""

    weight: ParameterSpec
    vectors: tuple[ParameterSpec, ...]


def draw_sequential(assembler: TopologyAssembler, config: ModelConfig) -> None:
    """Draws a chain of ``Linear``, ``Conv1d`` to ``Conv3d`` and norm layers, in the order of the manifest.

    Raises:
        ConfigError: The shapes do not follow on one another as a chain's do.
    """
    layers = _layers(assembler.manifest.parameters)
    width = layers[0].weight.shape[1]
    stream = assembler.nodes(width, "inputs", is_boundary=True)
    for number, layer in enumerate(layers):
        if layer.weight.shape[1] != len(stream):
            raise ConfigError(
                f"parameter {layer.weight.fqn!r} of shape {layer.weight.shape} does not read the {len(stream)} "
                "outputs of the layer before it: this is not a plain chain; build its graph from the module instead"
            )
        stream = _draw_layer(assembler, layer, stream, is_last=number == len(layers) - 1)


def _layers(parameters: tuple[ParameterSpec, ...]) -> list[_Layer]:
    layers: list[_Layer] = []
    for spec in parameters:
        if _REPARAMETRISED.search(spec.fqn):
            raise ConfigError(
                f"parameter {spec.fqn!r} is a factor of a weight (weight or spectral norm), which a plain chain has no "
                "place for; remove the parametrisation, or use a predictor without a graph"
            )
        if len(spec.shape) >= 2:
            layers.append(_Layer(spec, ()))
        elif not layers or len(spec.shape) != 1 or spec.numel != layers[-1].weight.shape[0]:
            raise ConfigError(
                f"parameter {spec.fqn!r} of shape {spec.shape} belongs to no matrix or kernel before it: "
                "this is not a plain chain; build its graph from the module instead"
            )
        else:
            layers[-1] = _Layer(layers[-1].weight, (*layers[-1].vectors, spec))
    if not layers:
        raise ConfigError("the model has no matrix and no kernel, so it has no graph")
    return layers


def _draw_layer(assembler: TopologyAssembler, layer: _Layer, stream: NodeRange, *, is_last: bool) -> NodeRange:
    weight = layer.weight
    vector_nodes = [assembler.nodes(1, vector.fqn, is_boundary=True) for vector in layer.vectors]
    outputs = assembler.nodes(weight.shape[0], f"{weight.fqn}.outputs", is_boundary=is_last)
    num_elements = weight.numel // (weight.shape[0] * weight.shape[1])
    matrix = MatrixSlice(
        fqn=weight.fqn,
        shape=weight.shape,
        input_stride=num_elements,
        output_stride=weight.shape[1] * num_elements,
    )
    edge_type = EdgeType.CONV if len(weight.shape) > 2 else EdgeType.FULLY_CONNECTED
    assembler.kernel(matrix, num_elements, stream, outputs, edge_type)
    for vector, node in zip(layer.vectors, vector_nodes, strict=True):
        is_bias = vector.fqn.endswith("bias")
        assembler.vector(vector.fqn, node, outputs, EdgeType.BIAS if is_bias else EdgeType.NORM)
    return outputs


# The published layout of a chain has no flaw, so the symmetric one is the same.
BUILDER = GraphBuilder(
    family="sequential",
    model_types=("sequential",),
    layouts={"official": draw_sequential, "symmetric": draw_sequential},
)
