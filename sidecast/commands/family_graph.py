"""What the graph of a model that transformers knows is drawn from, with a builder or without one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sidecast.checkpoints.transformers_models import example_inputs_of, model_of_config
from sidecast.errors import ConfigError
from sidecast.graphs.axes.description import describe_axes
from sidecast.graphs.registry import graph_builders


def graph_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration that graph builders draw a model from.

    A family without a builder is followed axis by axis: its model runs without memory, on the meta device, at its own
    size. ``sidecast graph --check`` proves such a graph at tiny widths.

    Args:
        config: The model's own.

    Returns:
        The same, if its family has a builder; else a description of its axes.

    Raises:
        ConfigError: transformers is missing or does not know the model, or the model needs values to run.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type in graph_builders():
        return config
    model = model_of_config({**config, "use_cache": False}, device="meta")
    model.config._attn_implementation = "eager"
    # The eager loop over experts looks at which of them tokens chose.
    model.config._experts_implementation = "batched_mm"
    inputs = example_inputs_of(model)
    if "input_ids" in inputs:
        # Without a mask, models look at values to see where sequences begin.
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    try:
        return describe_axes(model, inputs)
    except ConfigError as error:
        raise ConfigError(
            f"no graph builder for model_type {model_type!r}, and its axes cannot be followed without weights: {error}"
            "; give the model as --module, or use a predictor without a graph (linear, average, rank1, wnn)"
        ) from error
