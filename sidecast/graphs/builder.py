"""What a family of models brings: how to draw its layouts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sidecast.graphs.assembler import TopologyAssembler
from sidecast.graphs.model_config import ModelConfig

DrawLayout = Callable[[TopologyAssembler, ModelConfig], None]
"""Adds the nodes and blocks of a model, read from the assembler's manifest and the configuration."""


@dataclass(frozen=True, kw_only=True)
class GraphBuilder:
    """How to draw one family of models.

    Attributes:
        family: Its name in the topology.
        model_types: Values of ``model_type`` in a model's configuration that it stands for.
        layouts: One function for each layout that the family has.
    """

    family: str
    model_types: tuple[str, ...]
    layouts: Mapping[str, DrawLayout]
