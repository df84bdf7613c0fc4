"""What a saved model is drawn from: its configuration, the axes of its family, or a module of the user's."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch

from sidecast.checkpoints.transformers_models import example_inputs_of, model_of_config
from sidecast.commands.graph_check import check_config
from sidecast.errors import ConfigError
from sidecast.graphs.axes.description import describe_axes
from sidecast.graphs.registry import graph_builders
from sidecast.manifest import NAMES_KEY, ModelManifest


def graph_config(
    config: Mapping[str, Any], adapted_modules: Collection[str] = (), *, ways_out: str, is_checked: bool = False
) -> Mapping[str, Any]:
    """The configuration that graph builders draw a model from.

    A family without a builder is followed axis by axis: its model runs without memory, on the meta device, at its own
    size. Such a graph is used only if it is right at tiny widths.

    Args:
        config: The model's own.
        adapted_modules: Names of modules that have low-rank adapters.
        ways_out: What else the user can do, for messages.
        is_checked: Whether ``check_config`` has found nothing wrong with it already.

    Returns:
        The same, if its family has a builder; else a description of its axes.

    Raises:
        ConfigError: transformers is missing or does not know the model; the model needs values to run; or its graph is
            wrong at tiny widths, or cannot be checked there.
        NoRoomError: Memory has no room for the check.
    """
    own_names = {key: value for key, value in config.items() if key == NAMES_KEY}
    config = {key: value for key, value in config.items() if key != NAMES_KEY}
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type in graph_builders():
        return {**config, **own_names}
    if not is_checked:
        try:
            check_config(config, adapted_modules)
        except ConfigError as error:
            raise ConfigError(
                f"no graph builder for model_type {model_type!r}, and following its axes is not proved at tiny widths: "
                f"{error}; {ways_out}"
            ) from error
    model = model_of_config({**config, "use_cache": False}, device="meta")
    model.config._attn_implementation = "eager"
    # The eager loop over experts looks at which of them tokens chose.
    model.config._experts_implementation = "batched_mm"
    inputs = example_inputs_of(model)
    if "input_ids" in inputs:
        # Without a mask, models look at values to see where sequences begin.
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    try:
        return {**describe_axes(model, inputs), **own_names}
    except ConfigError as error:
        raise ConfigError(
            f"no graph builder for model_type {model_type!r}, and its axes cannot be followed without weights: {error}"
            f"; {ways_out}"
        ) from error


def described_by_module(manifest: ModelManifest, module: ModelManifest) -> ModelManifest:
    """The manifest of saved weights with the graph that was proved on a module: its description, and its ties.

    Args:
        manifest: Of the saved weights, which need not say what is tied.
        module: Of the module.

    Raises:
        ConfigError: The two tie parameters differently, or a tied one is saved under its further name alone.
    """
    saved = manifest.by_name
    for alias, name in module.aliases.items():
        if alias in saved and name not in saved:
            raise ConfigError(
                f"the checkpoints hold {alias!r}, which --module ties to {name!r}, and not {name!r} itself, where its "
                f"graph has that weight; give a module whose named_parameters() has it as {alias!r}"
            )
    for alias, name in manifest.aliases.items():
        if {alias, name} <= module.by_name.keys():
            raise ConfigError(
                f"the checkpoints tie {alias!r} to {name!r}, which are two parameters of --module; give a module that "
                "ties them"
            )
    ties = {alias: name for alias, name in module.aliases.items() if alias not in saved}
    return replace(manifest, config=module.config, aliases={**manifest.aliases, **ties})
