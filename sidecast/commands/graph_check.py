"""``sidecast graph --check``: proves a model's graph on the network, and says so in one line."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from typing import Any

from torch import nn

from sidecast.checkpoints.transformers_models import example_inputs_of, model_of_config, shrunken
from sidecast.errors import ConfigError
from sidecast.graphs.automorphism_check import AutomorphismCheck, check_automorphisms
from sidecast.graphs.double_precision import ExampleInputs
from sidecast.graphs.module_trace import checked_manifest_of_module
from sidecast.graphs.registry import build_topology
from sidecast.graphs.topology import Topology
from sidecast.manifest import ModelManifest

_LAYOUT = "symmetric"


def check_config(config: Mapping[str, Any]) -> str:
    """Checks the graph of a family of transformers at tiny widths, with random weights.

    Args:
        config: The model's configuration, of any size.

    Returns:
        One line for the user.

    Raises:
        ConfigError: The graph is wrong, or cannot be checked.
    """
    model_type = config.get("model_type")
    if model_type in ("sequential", "module_graph"):
        raise ConfigError(f"a configuration of model_type {model_type!r} names no class to run; give --module instead")
    tiny = {**shrunken(config), "use_cache": False}
    model = model_of_config(tiny, device="cpu")
    # Kernels of attention and experts that know no double precision.
    model.config._attn_implementation = "eager"
    model.config._experts_implementation = "eager"
    shapes = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    topology = build_topology(ModelManifest.from_shapes(shapes, model.config.to_dict()), _LAYOUT)
    return _line(topology, check_automorphisms(topology, model, example_inputs_of(model)), "at tiny widths")


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
