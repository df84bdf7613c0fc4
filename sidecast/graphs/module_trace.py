"""Reads the graph of operations from a module, so that a model without a known architecture can be drawn.

The result is plain JSON in the manifest's configuration: whoever holds the manifest can draw the same graph.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from sidecast.errors import ConfigError
from sidecast.graphs.registry import build_topology
from sidecast.graphs.topology import Topology
from sidecast.manifest import ModelManifest, ParameterSpec

MODEL_TYPE = "module_graph"

Operation = dict[str, Any]

# What acts on every channel alike, or only on other axes: channels stay where they are.
_PASSING_PACKAGES = ("activation", "dropout", "pooling", "padding", "upsampling")
_PASSING_MODULES = (nn.Identity, nn.Flatten)
_PASSING_FUNCTIONS = {
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "avg_pool1d", "avg_pool2d", "celu", "dropout", "dropout1d",
    "dropout2d", "elu", "flatten", "gelu", "hardsigmoid", "hardswish", "hardtanh", "interpolate", "leaky_relu",
    "log_softmax", "max_pool1d", "max_pool2d", "mean", "mish", "relu", "relu6", "selu", "sigmoid", "silu", "softmax",
    "softplus", "tanh", "contiguous", "relu_", "squeeze", "boolean_dispatch",
}  # fmt: skip
_CHANNELWISE_FUNCTIONS: dict[Callable[..., Any], str] = {
    operator.add: "add",
    operator.iadd: "add",
    torch.add: "add",
    operator.mul: "add",
    operator.imul: "add",
    torch.mul: "add",
}


def manifest_of_module(module: nn.Module) -> ModelManifest:
    """The trainable parameters of a module, and its operations as the configuration.

    Args:
        module: On any device, ``meta`` included; ``torch.fx`` must be able to trace it.

    Returns:
        A manifest of model type ``module_graph``.

    Raises:
        ConfigError: The module cannot be traced, or does something that has no place in a graph.
    """
    try:
        traced = fx.Tracer().trace(module)
    except (fx.proxy.TraceError, TypeError) as error:
        raise ConfigError(f"{type(module).__name__} cannot be traced: {error}") from error
    reader = _OperationReader(module)
    operations = [operation for node in traced.nodes if (operation := reader.read(node)) is not None]
    parameters: list[ParameterSpec] = []
    aliases: dict[str, str] = {}
    seen: dict[int, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            continue
        if id(parameter) in seen:
            aliases[name] = seen[id(parameter)]
        else:
            seen[id(parameter)] = name
            parameters.append(ParameterSpec(name, tuple(parameter.shape)))
    return ModelManifest(tuple(parameters), {"model_type": MODEL_TYPE, "operations": operations}, aliases)


def topology_of_module(module: nn.Module, *, unknown_parameters: str = "error") -> Topology:
    """Draws a module's graph in the symmetric layout: what ``manifest_of_module`` reads, built."""
    return build_topology(manifest_of_module(module), "symmetric", unknown_parameters=unknown_parameters)


class _OperationReader:
    """Turns nodes of a traced graph into operations."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._called: set[str] = set()
        self._recurrent: set[str] = set()

    def read(self, node: fx.Node) -> Operation | None:
        if node.op == "placeholder":
            return {"kind": "input", "value": node.name, "inputs": []}
        if node.op == "output":
            return {"kind": "output", "value": node.name, "inputs": _values(node)}
        if node.op == "call_module":
            return self._read_module(node)
        if node.op in ("call_function", "call_method"):
            return self._read_function(node)
        raise ConfigError(f"the model uses the tensor {node.target!r} directly; its graph has no place for that")

    def _read_module(self, node: fx.Node) -> Operation:
        name = str(node.target)
        module = self._module.get_submodule(name)
        operation: Operation = {"value": node.name, "inputs": _values(node)[:1], "module": name}
        if any(True for _ in module.parameters()):
            if name in self._called:
                raise ConfigError(f"module {name!r} is called twice; its graph has no place for shared weights")
            self._called.add(name)
        operation.update(_describe(name, module))
        if operation["kind"] == "recurrent":
            self._recurrent.add(node.name)
        return operation

    def _read_function(self, node: fx.Node) -> Operation | None:
        target = node.target
        name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
        inputs = _values(node)
        if target is operator.getitem and inputs[0] in self._recurrent:
            self._recurrent.add(node.name)
            return {"kind": "pass", "value": node.name, "inputs": inputs[:1]}
        if not isinstance(target, str) and target in _CHANNELWISE_FUNCTIONS:
            kind = _CHANNELWISE_FUNCTIONS[target] if len(inputs) > 1 else "pass"
            return {"kind": kind, "value": node.name, "inputs": inputs}
        if name == "size":
            return None
        flattens = name in ("view", "reshape") and len(node.args) == 3 and node.args[2] == -1
        if name in _PASSING_FUNCTIONS or flattens:
            return {"kind": "pass", "value": node.name, "inputs": inputs[:1]}
        raise ConfigError(f"the model calls {name!r}, which its graph has no place for")


def _values(node: fx.Node) -> list[str]:
    return [argument.name for argument in node.all_input_nodes]


def _describe(name: str, module: nn.Module) -> Operation:
    """What one module does, in plain values."""
    if isinstance(module, nn.Linear):
        shape = {"num_inputs": module.in_features, "num_outputs": module.out_features}
        return {"kind": "linear", **shape, "has_bias": module.bias is not None}
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        shape = {"num_inputs": module.in_channels, "num_outputs": module.out_channels}
        kernel = {"kernel_size": list(module.kernel_size), "num_groups": module.groups}
        return {"kind": "convolution", **shape, **kernel, "has_bias": module.bias is not None}
    if isinstance(module, nn.Embedding):
        return {"kind": "embedding", "num_inputs": module.num_embeddings, "num_outputs": module.embedding_dim}
    if isinstance(module, nn.LSTM | nn.GRU | nn.RNN):
        return _describe_recurrent(name, module)
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if isinstance(module, nn.GroupNorm) and module.num_groups not in (1, module.num_channels):
        raise ConfigError(
            f"module {name!r} normalises {module.num_groups} groups of channels; its graph needs 1 or all"
        )
    if type(module).__module__.endswith((".batchnorm", ".normalization", ".instancenorm")):
        if weight is not None and weight.dim() != 1:
            raise ConfigError(f"module {name!r} normalises over {weight.dim()} axes; its graph has a place for one")
        return {"kind": "norm", "has_weight": weight is not None, "has_bias": bias is not None}
    is_passing = isinstance(module, _PASSING_MODULES) or type(module).__module__.endswith(_PASSING_PACKAGES)
    if is_passing and not any(True for _ in module.parameters()):
        return {"kind": "pass"}
    raise ConfigError(f"module {name!r} is a {type(module).__name__}, which its graph has no place for")


def _describe_recurrent(name: str, module: nn.RNNBase) -> Operation:
    if module.proj_size:
        raise ConfigError(f"module {name!r} has proj_size={module.proj_size}; its graph needs 0")
    return {
        "kind": "recurrent",
        "gates": {"LSTM": ["input", "forget", "cell", "output"], "GRU": ["reset", "update", "new"]}.get(
            module.mode, ["hidden"]
        ),
        "num_inputs": module.input_size,
        "num_outputs": module.hidden_size,
        "num_layers": module.num_layers,
        "has_bias": bool(module.bias),
        "is_bidirectional": bool(module.bidirectional),
    }
