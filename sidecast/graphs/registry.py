"""Which builder draws which model's graph; other packages add builders by entry point."""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points

from sidecast.errors import ConfigError
from sidecast.graphs.adapters import draw_adapter, put_together, take_apart
from sidecast.graphs.assembler import TopologyAssembler
from sidecast.graphs.builder import GraphBuilder
from sidecast.graphs.builders import BUILDERS
from sidecast.graphs.model_config import ModelConfig
from sidecast.graphs.topology import Topology
from sidecast.manifest import ModelManifest

LAYOUTS = ("official", "symmetric")
ENTRY_POINT_GROUP = "sidecast.graph_builders"


@cache
def graph_builders() -> dict[str, GraphBuilder]:
    """Every known builder by model type: ours, and those of installed packages, which may not replace ours.

    Raises:
        ConfigError: Two builders claim one model type.
    """
    builders: dict[str, GraphBuilder] = {}
    loaded = [entry_point.load() for entry_point in entry_points(group=ENTRY_POINT_GROUP)]
    for builder in (*BUILDERS, *loaded):
        for model_type in builder.model_types:
            if model_type in builders:
                raise ConfigError(
                    f"graph builders {builders[model_type].family!r} and {builder.family!r} "
                    f"both claim model_type {model_type!r}"
                )
            builders[model_type] = builder
    return builders


def build_topology(
    manifest: ModelManifest, layout: str | None = "official", *, unknown_parameters: str = "error"
) -> Topology:
    """Draws the neural graph of a model from names, shapes and configuration alone.

    Args:
        manifest: The model's trainable parameters and its configuration.
        layout: ``official``, as the published weights know it, or ``symmetric``; None for ``official`` where the family
            has it, else ``symmetric``.
        unknown_parameters: What becomes of a parameter that the builder does not know: ``error`` refuses the
            model, ``isolate`` gives it nodes of its own.

    Returns:
        The topology. Parameters that the manifest lacks are frozen: named in ``absent``, without edges. Low-rank
        adapters run through nodes of their own beside the matrix that they adapt.

    Raises:
        ConfigError: The model type, layout, a shape or a parameter is not one that the builder knows.
    """
    if unknown_parameters not in ("error", "isolate"):
        raise ConfigError(f"unknown_parameters is {unknown_parameters!r}; allowed: error, isolate")
    if layout is not None and layout not in LAYOUTS:
        raise ConfigError(f"layout is {layout!r}; allowed: {', '.join(LAYOUTS)}")
    config = ModelConfig(manifest.config)
    builder = graph_builders().get(config.model_type)
    if builder is None:
        raise ConfigError(
            f"no graph builder for model_type {config.model_type!r}; supported: {', '.join(sorted(graph_builders()))}; "
            "sidecast.graphs.remember_graph(model, example_inputs) before training draws any other"
        )
    if layout is None:
        layout = next((name for name in LAYOUTS if name in builder.layouts), LAYOUTS[0])
    draw = builder.layouts.get(layout)
    if draw is None:
        raise ConfigError(
            f"model_type {config.model_type!r} has no {layout!r} layout; it has: {', '.join(builder.layouts)}"
        )
    model = take_apart(manifest)
    assembler = TopologyAssembler(model.base, (adapter.module for adapter in model.adapters))
    draw(assembler, config)
    adapter_blocks = [block for adapter in model.adapters for block in draw_adapter(assembler, adapter)]
    topology = assembler.finish(builder.family, layout, isolate_unknown=unknown_parameters == "isolate")
    return put_together(topology, manifest, model, adapter_blocks)
