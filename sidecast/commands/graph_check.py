"""``sidecast graph --check``: proves a model's graph on the network, and says so in one line."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sidecast.checkpoints.transformers_models import example_inputs_of, model_of_config
from sidecast.commands.tiny_adapters import add_adapters
from sidecast.commands.tiny_configs import scaled, shrunken
from sidecast.errors import ConfigError, one_line
from sidecast.graphs.automorphism_check import AutomorphismCheck, check_automorphisms
from sidecast.graphs.axes.description import describe_axes
from sidecast.graphs.double_precision import ExampleInputs
from sidecast.graphs.module_trace import checked_manifest_of_module
from sidecast.graphs.registry import build_topology, graph_builders
from sidecast.graphs.topology import Topology
from sidecast.manifest import ModelManifest

_LAYOUT = "symmetric"
_NEEDS_MODULE = ("sequential", "module_graph", "axis_graph")
_MAX_ELEMENTS = 5_000_000


def check_config(
    config: Mapping[str, Any], adapted_modules: Collection[str] = ()
) -> tuple[Topology, AutomorphismCheck]:
    """Checks the graph of a family of transformers at tiny widths, with random weights.

    A family without a builder is followed axis by axis.

    Args:
        config: The model's configuration, of any size.
        adapted_modules: Names of modules that have low-rank adapters; those of other layers stand for them.

    Returns:
        The tiny model's graph, and what was done.

    Raises:
        ConfigError: The graph is wrong, or cannot be checked.
    """
    model_type = config.get("model_type")
    if model_type in _NEEDS_MODULE:
        raise ConfigError(f"a configuration of model_type {model_type!r} names no class to run; give --module instead")
    model, inputs = tiny_model(config)
    followed = None if model_type in graph_builders() else describe_axes(model, inputs)
    if adapted_modules:
        add_adapters(model, adapted_modules)
    shapes = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    described = model.config.to_dict() if followed is None else followed
    topology = build_topology(ModelManifest.from_shapes(shapes, described), _LAYOUT)
    return topology, check_automorphisms(topology, model, inputs)


def tiny_model(config: Mapping[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    """A small model of a family and its inputs, in the first of the ways to make it small that can be run.

    Args:
        config: The model's configuration, of any size.

    Returns:
        The model with random weights, on the CPU, and named inputs.

    Raises:
        ConfigError: transformers cannot make it, it stays large, or it cannot be run.
    """
    problems: list[ConfigError] = []
    tried: list[dict[str, Any]] = []
    # Groups of experts and of states are kept where the family can be run with them.
    ways: tuple[Callable[[Mapping[str, Any]], dict[str, Any]], ...]
    ways = (shrunken, partial(shrunken, num_groups=1), scaled)
    for make_small in ways:
        try:
            small = {**make_small(config), "use_cache": False}
            if small in tried:
                continue
            tried.append(small)
            return _running_model(small)
        except ConfigError as error:
            problems.append(error)
    raise problems[0]


def _running_model(config: Mapping[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    model = model_of_config(config, device="meta")
    num_elements = sum(parameter.numel() for parameter in model.parameters())
    if num_elements > _MAX_ELEMENTS:
        raise ConfigError(
            f"{type(model).__name__} still has {num_elements:,} parameters where a check has made it small, and "
            f"{_MAX_ELEMENTS:,} are the most; make it small yourself, and give it as --module"
        )
    model = model_of_config(config, device="cpu")
    # Kernels of attention and experts that know no double precision.
    model.config._attn_implementation = "eager"
    model.config._experts_implementation = "eager"
    inputs = example_inputs_of(model)
    try:
        with torch.no_grad():
            model.eval()(**inputs)
    except Exception as error:  # whatever a model's forward raises
        raise ConfigError(f"{type(model).__name__} cannot be run at tiny widths: {one_line(error)}") from error
    return model, inputs


def line_of_config(config: Mapping[str, Any], adapted_modules: Collection[str] = ()) -> str:
    """Checks the graph of a family as ``check_config`` does, and says so in one line."""
    where = "with adapters, at tiny widths" if adapted_modules else "at tiny widths"
    return _line(*check_config(config, adapted_modules), where)


def load_module(name: str) -> tuple[nn.Module, ExampleInputs]:
    """Calls the function ``package.module:function`` of the user's, which gives a module and example inputs.

    Modules in the current folder are found too.

    Raises:
        ConfigError: There is no such function, it fails, or gives something else.
    """
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise ConfigError(f"--module is {name!r}; it must be MODULE:FUNCTION")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        made = getattr(importlib.import_module(module_name), function_name)()
    except Exception as error:  # whatever the user's module raises
        problem = " ".join(str(error).split())
        raise ConfigError(f"--module {name} failed: {type(error).__name__}: {problem}") from error
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module)):
        raise ConfigError(f"--module {name} gave a {type(made).__name__}; it must give (module, example_inputs)")
    return made


def check_module(module: nn.Module, example_inputs: ExampleInputs) -> tuple[Topology, str]:
    """Traces and checks a module.

    Returns:
        Its graph, and one line for the user.

    Raises:
        ConfigError: The module has no graph, or the graph is wrong or cannot be checked.
        NoRoomError: Memory has no room for the check.
    """
    manifest, check = checked_manifest_of_module(module, example_inputs)
    topology = build_topology(manifest, _LAYOUT)
    return topology, _line(topology, check, f"of {type(module).__name__}")


def _line(topology: Topology, check: AutomorphismCheck, where: str) -> str:
    line = (
        f"{topology.family}, {topology.layout}: right {where}: {check.num_automorphisms} permutations that keep the "
        f"graph moved {check.num_moved_elements:,} of {check.num_elements:,} elements, and the output by "
        f"{check.largest_change:.0e} of its standard deviation"
    )
    if check.without_effect:
        line += f"; unchecked, because without effect on the output: {', '.join(check.without_effect)}"
    return line
