"""The nowcasters as differentiable functions of their tensors, on random parts of a graph.

The same functions as ``NinoNetwork`` and ``WnnPlusNetwork``, whose tensors have the same names; those need PyTorch
Geometric, every edge at once, and a product of hidden vectors for each edge where this has one for each node.

Shape suffixes: V nodes, E edges, D hidden, X edge features, F kernel elements, C context, K horizons.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import linear, relu, silu

from sidecast.metatraining.edges import SampledEdges
from sidecast.predictors.nino.config import NinoConfig
from sidecast.predictors.wnn import OPERATIONS, WnnConfig, WnnNetwork

Tensors = Mapping[str, Tensor]


def nino_hidden(
    config: NinoConfig, tensors: Tensors, features_EX: Tensor, sampled: SampledEdges, degree_V: Tensor, lpe_VL: Tensor
) -> Tensor:
    """What NiNo's last layer is given on some edges, (E, D).

    A node's mean message is estimated from the edges that are given, each with its weight; with all edges it is exact.

    Args:
        config: Hyper-parameters.
        tensors: The network.
        features_EX: Scaled states on each edge, fp32, kernel-element-major.
        sampled: The edges.
        degree_V: Incoming edges of each node in the whole graph.
        lpe_VL: Positional encoding of the nodes.
    """
    source_E, target_E = sampled.edges.index_2E
    nodes_VD = _linear(tensors, "node_proj.fc.0", lpe_VL)
    edges_ED = _projected(tensors, features_EX, sampled.edges.type_E)
    share_E1 = (sampled.weight_E / degree_V[target_E])[:, None]
    for layer in range(config.num_layers - 1):
        name = f"gnn.convs.{layer}"
        pre_DD, pre_bias_D = tensors[f"{name}.pre_nns.0.0.weight"], tensors[f"{name}.pre_nns.0.0.bias"]
        dim = config.hidden_dim
        of_target_VD = linear(nodes_VD, pre_DD[:, :dim], pre_bias_D)
        of_source_VD = linear(nodes_VD, pre_DD[:, dim:])
        scale_ED, shift_ED = _linear(tensors, f"{name}.edge_encoder", edges_ED).chunk(2, dim=-1)
        message_ED = scale_ED * (of_target_VD[target_E] + of_source_VD[source_E]) + shift_ED
        mean_VD = torch.zeros_like(nodes_VD).index_add(0, target_E, share_E1 * message_ED)
        mixed_VD = _linear(tensors, f"{name}.post_nns.0.0", torch.cat([nodes_VD, mean_VD], dim=-1))
        nodes_VD = silu(_linear(tensors, f"{name}.lin", mixed_VD))
        name = f"gnn.edge_update.{layer}"
        ends_ED = (
            _linear(tensors, f"{name}.lin_s", nodes_VD)[source_E]
            + _linear(tensors, f"{name}.lin_t", nodes_VD)[target_E]
        )
        edges_ED = _linear(tensors, f"{name}.lin1", silu(_linear(tensors, f"{name}.lin_e", edges_ED) + ends_ED))
    return silu(_linear(tensors, "edge_out.fc.0", edges_ED))


def wnn_plus_hidden(config: NinoConfig, tensors: Tensors, states_EC: Tensor, type_E: Tensor) -> Tensor:
    """What WNN+'s last layer is given for parameters, (E, D), from their scaled states and types."""
    hidden_ED = _projected(tensors, states_EC, type_E)
    for layer in range(config.num_mlp_layers - 1):
        hidden_ED = silu(_linear(tensors, f"edge_mlp.fc.{2 * layer}", hidden_ED))
    return hidden_ED


def hidden_to_changes(config: NinoConfig, tensors: Tensors, hidden_ED: Tensor, num_kernel_elements: int = 1) -> Tensor:
    """Scaled changes of NiNo or WNN+, (E, F, K), from what its last layer is given."""
    layer, rows = last_layer(config), num_kernel_elements * config.max_horizon
    changes = linear(hidden_ED, tensors[f"{layer}.weight"][:rows], tensors[f"{layer}.bias"][:rows])
    return changes.unflatten(-1, (num_kernel_elements, config.max_horizon))


def last_layer(config: NinoConfig) -> str:
    """Name of the layer whose outputs are the changes."""
    return "edge_out.fc.2" if config.gnn else f"edge_mlp.fc.{2 * config.num_mlp_layers - 2}"


def wnn_changes(tensors: Tensors, states_EC: Tensor, operation_E: Tensor) -> Tensor:
    """Scaled changes of WNN, (E, K).

    Args:
        tensors: The network.
        states_EC: Scaled states.
        operation_E: Which of ``OPERATIONS`` each parameter belongs to, by number.
    """
    changes_EK = states_EC.new_zeros(len(states_EC), tensors["operations.bias.joint.1.bias"].shape[0])
    for number, operation in enumerate(OPERATIONS):
        edges = (operation_E == number).nonzero()[:, 0]
        if len(edges):
            changes_EK = changes_EK.index_copy(0, edges, _two_streams(tensors, operation, states_EC[edges]))
    return changes_EK


def _two_streams(tensors: Tensors, operation: str, states_NC: Tensor) -> Tensor:
    streams = []
    for stream, inputs in (("values", states_NC), ("differences", states_NC.diff(dim=-1))):
        name = f"operations.{operation}.{stream}"
        streams.append(_linear(tensors, f"{name}.2", relu(_linear(tensors, f"{name}.0", inputs))))
    return _linear(tensors, f"operations.{operation}.joint.1", relu(torch.cat(streams, dim=-1)))


def _projected(tensors: Tensors, features_EX: Tensor, type_E: Tensor) -> Tensor:
    # Columns beyond those given count as 0.
    weight = tensors["edge_proj.fc.0.weight"][:, : features_EX.shape[1]]
    return linear(features_EX, weight, tensors["edge_proj.fc.0.bias"]) + tensors["layer_embed.weight"][type_E]


def _linear(tensors: Tensors, name: str, inputs: Tensor) -> Tensor:
    return linear(inputs, tensors[f"{name}.weight"], tensors[f"{name}.bias"])


def initial_tensors(config: NinoConfig | WnnConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """A network that predicts no change, and whose first layer sees the differences between states as well as states.

    Args:
        config: Hyper-parameters.
        generator: Decides.
    """
    shapes = config.shapes() if isinstance(config, NinoConfig) else _wnn_shapes(config)
    last_layers = _last_layers(config)
    tensors = {}
    for name, shape in shapes.items():
        layer = name.rpartition(".")[0]
        # As torch.nn.Linear begins; biases have the bound of their weights.
        fan_in = shapes[f"{layer}.weight"][-1]
        tensors[name] = torch.empty(shape).uniform_(-1.0, 1.0, generator=generator) * fan_in**-0.5
        if layer in last_layers:
            tensors[name].zero_()
    if isinstance(config, NinoConfig):
        _see_differences_(tensors["edge_proj.fc.0.weight"], config.context_len)
    else:
        for operation in OPERATIONS:
            tensors[f"operations.{operation}.differences.0.weight"] *= _DIFFERENCE_GAIN
    return tensors


_DIFFERENCE_GAIN = 8.0
"""States of one window differ by little, in units of their scale: without it, what matters would be hard to see."""


def _last_layers(config: NinoConfig | WnnConfig) -> tuple[str, ...]:
    if isinstance(config, WnnConfig):
        return tuple(f"operations.{operation}.joint.1" for operation in OPERATIONS)
    return (last_layer(config),)


def _see_differences_(weight_DX: Tensor, context_len: int) -> None:
    """Makes the columns of each kernel element act on the newest state and on enlarged differences."""
    for start in range(0, weight_DX.shape[1], context_len):
        columns_DC = weight_DX[:, start : start + context_len]
        newest_D, of_differences = columns_DC[:, -1].clone(), _DIFFERENCE_GAIN * columns_DC[:, :-1]
        columns_DC.zero_()
        columns_DC[:, -1] += newest_D
        columns_DC[:, 1:] += of_differences
        columns_DC[:, :-1] -= of_differences


def _wnn_shapes(config: WnnConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in WnnNetwork(config).state_dict().items()}
