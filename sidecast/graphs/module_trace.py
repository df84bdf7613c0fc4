"""Reads the graph of operations from a module, so that a model without a known architecture can be drawn.

The result is plain JSON in the manifest's configuration: whoever holds the manifest can draw the same graph.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.nn.parameter import UninitializedParameter

from sidecast.errors import ConfigError
from sidecast.graphs.automorphism_check import AutomorphismCheck, check_automorphisms
from sidecast.graphs.axes.description import describe_axes
from sidecast.graphs.double_precision import ExampleInputs
from sidecast.graphs.registry import build_topology
from sidecast.graphs.topology import Topology
from sidecast.manifest import GRAPH_ATTRIBUTE, ModelManifest, ParameterSpec

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
    operator.mul: "mul",
    operator.imul: "mul",
    torch.mul: "mul",
}


def manifest_of_module(module: nn.Module, example_inputs: ExampleInputs | None = None) -> ModelManifest:
    """The trainable parameters of a module, and its operations as the configuration; its graph is checked.

    The check runs a copy in double precision with random parameters, before and after random automorphisms of the
    graph: the output may not change. Frozen parameters are treated as trainable there.

    Args:
        module: On any device. On ``meta`` it may have no buffers but those of norms. What ``torch.fx`` cannot trace, or
            a graph of layers has no place for, is run and followed axis by axis.
        example_inputs: What it is called with: a tensor, a sequence of arguments, or a mapping of named ones. A warning
            names parameters that have no effect on the output: sequences of one token, for one, show no recurrence.

    Returns:
        A manifest of model type ``module_graph``, or ``axis_graph``.

    Raises:
        ConfigError: The module cannot be run, or its graph has a symmetry that it lacks; or the example inputs are
            missing or do not fit.
        NoRoomError: Memory has no room for the copy.
    """
    manifest, check = checked_manifest_of_module(module, example_inputs)
    _warn(module, check)
    return manifest


def checked_manifest_of_module(
    module: nn.Module, example_inputs: ExampleInputs | None
) -> tuple[ModelManifest, AutomorphismCheck]:
    """What ``manifest_of_module`` gives, and what its check has done, in place of a warning."""
    if example_inputs is None:
        raise _missing_inputs(module)
    try:
        config = _operations_of(module)
        check = _check(module, config, example_inputs)
    except ConfigError:
        # Followed axis by axis it is less symmetric at worst, where layers and operations say too little.
        _manifest(module, {}, frozen=True)
        config = describe_axes(module, example_inputs)
        check = _check(module, config, example_inputs)
    return _manifest(module, config, frozen=False), check


def _operations_of(module: nn.Module) -> dict[str, Any]:
    """The configuration of a module whose layers and operations all have a place in a graph."""
    name = type(module).__name__
    try:
        traced = fx.Tracer().trace(module)
    except Exception as error:  # tracing runs the module's own code
        first = next(iter(str(error).splitlines()), "")
        raise ConfigError(f"{name} cannot be traced: {type(error).__name__}: {first}") from error
    reader = _OperationReader(module)
    operations = [operation for node in traced.nodes if (operation := reader.read(node)) is not None]
    return {"model_type": MODEL_TYPE, "operations": operations}


def remember_graph(module: nn.Module, example_inputs: ExampleInputs) -> ModelManifest:
    """Draws and checks a module's graph, and keeps its description with the module for whatever nowcasts it.

    Call it before the module is wrapped or given to an engine; ``attach``, the callbacks and ``NowcastOptimizer`` then
    find the description, so that predictors with a graph work on it.

    Args:
        module: As for ``manifest_of_module``.
        example_inputs: As for ``manifest_of_module``.

    Returns:
        Its manifest.

    Raises:
        ConfigError: As ``manifest_of_module``.
        NoRoomError: As ``manifest_of_module``.
    """
    manifest = manifest_of_module(module, example_inputs)
    setattr(module, GRAPH_ATTRIBUTE, dict(manifest.config))
    return manifest


def manifest_of_chain(module: nn.Module, example_inputs: ExampleInputs | None = None) -> ModelManifest:
    """The trainable parameters of a plain chain of layers, whose graph has the published layout; it is checked.

    Args:
        module: Linear and convolutional layers and norms, one after another, in the order of their parameters.
        example_inputs: As for ``manifest_of_module``.

    Returns:
        A manifest of model type ``sequential``.

    Raises:
        ConfigError: The shapes do not follow on one another; a layer does what a plain chain's does not (grouped or
            transposed convolutions, norms over groups of channels); or the example inputs are missing or do not fit.
        NoRoomError: Memory has no room for the copy.
    """
    config = {"model_type": "sequential"}
    _warn(module, _check(module, config, example_inputs))
    return _manifest(module, config, frozen=False)


def _check(module: nn.Module, config: dict[str, Any], example_inputs: ExampleInputs | None) -> AutomorphismCheck:
    """Checks the graph of all parameters, frozen ones included."""
    if example_inputs is None:
        raise _missing_inputs(module)
    topology = build_topology(_manifest(module, config, frozen=True), "symmetric", unknown_parameters="isolate")
    return check_automorphisms(topology, module, example_inputs)


def _missing_inputs(module: nn.Module) -> ConfigError:
    return ConfigError(
        f"the graph of {type(module).__name__} is checked by running it, which needs example_inputs: a tensor, "
        "a tuple of arguments, or a mapping of named ones"
    )


def _warn(module: nn.Module, check: AutomorphismCheck) -> None:
    if check.without_effect:
        more = f" and {len(check.without_effect) - 1} more" if len(check.without_effect) > 1 else ""
        warnings.warn(
            f"the output of {type(module).__name__} does not depend on {check.without_effect[0]!r}{more} with these "
            "example inputs, so that the place of that in the graph is unchecked; give longer or larger inputs",
            stacklevel=3,
        )


def _manifest(module: nn.Module, config: dict[str, Any], *, frozen: bool) -> ModelManifest:
    """The module's parameters, with or without frozen ones, tied ones once."""
    parameters: list[ParameterSpec] = []
    aliases: dict[str, str] = {}
    seen: dict[int, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if not (frozen or parameter.requires_grad):
            continue
        if isinstance(parameter, UninitializedParameter):
            raise ConfigError(f"parameter {name!r} has no shape yet; run the module once before its graph is drawn")
        if id(parameter) in seen:
            aliases[name] = seen[id(parameter)]
        else:
            seen[id(parameter)] = name
            parameters.append(ParameterSpec(name, tuple(parameter.shape)))
    return ModelManifest(tuple(parameters), config, aliases)


def topology_of_module(
    module: nn.Module, example_inputs: ExampleInputs | None = None, *, unknown_parameters: str = "error"
) -> Topology:
    """Draws a module's graph in the symmetric layout: what ``manifest_of_module`` reads, built."""
    manifest = manifest_of_module(module, example_inputs)
    return build_topology(manifest, "symmetric", unknown_parameters=unknown_parameters)


class _OperationReader:
    """Turns nodes of a traced graph into operations."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._called: set[str] = set()
        self._recurrent: set[str] = set()

    def read(self, node: fx.Node) -> Operation | None:
        """What a node of the traced graph does; None if it makes no value of the network."""
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
        inputs = _values(node)
        if len(inputs) > 1:
            what = "an initial state" if isinstance(module, nn.RNNBase) else f"{len(inputs)} values"
            raise ConfigError(f"module {name!r} is given {what}; its graph has a place for one value")
        operation: Operation = {"value": node.name, "inputs": inputs, "module": name}
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
            kind = "add" if len(inputs) > 1 else "pass"
            function = _CHANNELWISE_FUNCTIONS[target] + _constants(node)
            return {"kind": kind, "value": node.name, "inputs": inputs, "function": function}
        if name == "size":
            return None
        flattens = name in ("view", "reshape") and len(node.args) == 3 and node.args[2] == -1
        if name in _PASSING_FUNCTIONS or flattens:
            if len(inputs) > 1:
                raise ConfigError(
                    f"the model calls {name!r} with {len(inputs)} values, which its graph has no place for"
                )
            return {"kind": "pass", "value": node.name, "inputs": inputs, "function": name + _constants(node)}
        raise ConfigError(f"the model calls {name!r}, which its graph has no place for")


def _values(node: fx.Node) -> list[str]:
    return [argument.name for argument in node.all_input_nodes if argument.target != "size"]


def _constants(node: fx.Node) -> str:
    """A call's arguments but for values of the network."""
    arguments = [repr(argument) for argument in node.args if not isinstance(argument, fx.Node)]
    arguments += [f"{key}={value!r}" for key, value in node.kwargs.items() if not isinstance(value, fx.Node)]
    return f"({', '.join(arguments)})"


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
        if isinstance(module, nn.LocalResponseNorm | nn.CrossMapLRN2d):
            raise ConfigError(f"module {name!r} is a {type(module).__name__}, which mixes neighbouring channels")
        flags = {"has_weight": weight is not None, "has_bias": bias is not None}
        return {"kind": "norm", **flags, "function": type(module).__name__}
    is_passing = isinstance(module, _PASSING_MODULES) or type(module).__module__.endswith(_PASSING_PACKAGES)
    if is_passing and not any(True for _ in module.parameters()):
        return {"kind": "pass", "function": repr(module)}
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
