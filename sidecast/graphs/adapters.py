"""Low-rank adapters: which of a manifest's parameters they are, and where they go in the graph of the model they adapt.

Only what is trained is in a manifest. So the adapted, frozen matrices have nodes and no edges, and an adapter's two
matrices run through one node for each rank, from the inputs to the outputs of the matrix that they adapt.

Source: LoRA (arXiv 2106.09685); names as in the PEFT library.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from sidecast.errors import ConfigError
from sidecast.graphs.assembler import MatrixSlice, TopologyAssembler
from sidecast.graphs.topology import Block, EdgeType, NodeRange, Topology
from sidecast.manifest import ModelManifest, ParameterSpec, unwrapped_name

_WRAPPER = "base_model.model."
_DATA_PARALLEL = "module."
# PEFT leaves the adapter's name out of what it saves.
_FACTOR = re.compile(r"^(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.weight$")
# Norms of models that were converted from TensorFlow; transformers renames them when it loads one.
_TENSORFLOW_NORMS = {"gamma": "weight", "beta": "bias"}
_SAVED = re.compile(r"\.(?:base_layer|modules_to_save\.[^.]+)(?=\.)")


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """The two factors of one adapted matrix.

    Attributes:
        module: The adapted module, named as without adapters.
        down: Factor A, of shape (rank, inputs).
        up: Factor B, of shape (outputs, rank).
    """

    module: str
    down: ParameterSpec
    up: ParameterSpec


@dataclass(frozen=True)
class AdaptedModel:
    """A manifest taken apart.

    Attributes:
        base: The model as without adapters: parameters under their plain names, factors left out.
        adapters: The factors.
        names: ``{plain name: name in the manifest}`` of the base's parameters.
    """

    base: ModelManifest
    adapters: tuple[Adapter, ...]
    names: dict[str, str]


def _unwrapped(manifest: ModelManifest) -> dict[str, str]:
    """``{name in the manifest: name without what wrappers add}``, of parameters and aliases."""
    names = {name: name for name in (*(spec.fqn for spec in manifest.parameters), *manifest.aliases)}
    if manifest.config.get("model_type") == "module_graph":
        # Its operations have the names of the module that was traced.
        return names
    names = {name: unwrapped_name(name) for name in names}
    # A module may well be called "module"; a wrapper has all of them.
    while names and all(plain.startswith(_DATA_PARALLEL) for plain in names.values()):
        names = {name: plain.removeprefix(_DATA_PARALLEL) for name, plain in names.items()}
    names = {name: plain.removeprefix(_WRAPPER) for name, plain in names.items()}
    if manifest.config.get("model_type") == "bert":
        names = {name: _with_torch_norm(plain) for name, plain in names.items()}
    return names


def _with_torch_norm(name: str) -> str:
    module, _, last = name.rpartition(".")
    return f"{module}.{_TENSORFLOW_NORMS[last]}" if module.endswith("LayerNorm") and last in _TENSORFLOW_NORMS else name


def take_apart(manifest: ModelManifest) -> AdaptedModel:
    """Separates adapters from the model that they adapt, and takes off what wrappers add to names.

    Raises:
        ConfigError: A factor's counterpart is missing.
    """
    factors: dict[tuple[str, str | None], dict[str, ParameterSpec]] = {}
    names: dict[str, str] = {}
    base = []
    unwrapped = _unwrapped(manifest)
    for spec in manifest.parameters:
        plain = _SAVED.sub("", unwrapped[spec.fqn])
        match = _FACTOR.match(plain)
        if match:
            factors.setdefault((match["module"], match["adapter"]), {})[match["side"]] = spec
        else:
            names[plain] = spec.fqn
            base.append(ParameterSpec(plain, spec.shape))
    adapters = []
    for (module, _), pair in factors.items():
        if len(pair) != 2:
            fqn = next(iter(pair.values())).fqn
            raise ConfigError(f"parameter {fqn!r} is one factor of an adapter; the manifest lacks the other")
        adapters.append(Adapter(module=module, down=pair["A"], up=pair["B"]))
    aliases = {unwrapped[alias]: unwrapped.get(fqn, fqn) for alias, fqn in manifest.aliases.items()}
    return AdaptedModel(ModelManifest(tuple(base), manifest.config, aliases), tuple(adapters), names)


def draw_adapter(assembler: TopologyAssembler, adapter: Adapter) -> list[Block]:
    """The blocks of one adapter, between nodes that the builder has drawn and new ones for the ranks.

    Raises:
        ConfigError: The builder has drawn no matrix of that name, or one of another shape.
    """
    placements = assembler.placements.get(f"{adapter.module}.weight")
    if not placements:
        raise ConfigError(f"adapter {adapter.down.fqn!r} adapts a matrix that its graph builder does not know")
    rank, num_inputs = adapter.down.shape
    ranks = assembler.nodes(rank, f"{adapter.down.fqn}.ranks")
    blocks = []
    inputs = placements[0].inputs
    num_outputs = sum(len(placement.outputs) for placement in placements)
    if num_inputs != len(inputs) or adapter.up.shape != (num_outputs, rank):
        raise ConfigError(
            f"adapter {adapter.down.fqn!r} maps {num_inputs} inputs to {adapter.up.shape[0]} outputs; "
            f"the matrix that it adapts has {len(inputs)} and {num_outputs}"
        )
    down = MatrixSlice.linear(adapter.down.fqn, num_inputs, rank)
    is_reversed = all(placement.is_reversed for placement in placements)
    blocks.append(_block(down.fqn, down, inputs, ranks, is_reversed=is_reversed))
    first = 0
    for placement in placements:
        up = MatrixSlice(
            fqn=adapter.up.fqn, shape=adapter.up.shape, offset=first * rank, input_stride=1, output_stride=rank
        )
        name = up.fqn if len(placements) == 1 else f"{up.fqn}.rows{first}"
        blocks.append(_block(name, up, ranks, placement.outputs, is_reversed=placement.is_reversed))
        first += len(placement.outputs)
    return blocks


def _block(name: str, matrix: MatrixSlice, inputs: NodeRange, outputs: NodeRange, *, is_reversed: bool) -> Block:
    return matrix.block(name, inputs, outputs, EdgeType.FULLY_CONNECTED, is_reversed=is_reversed)


def put_together(topology: Topology, manifest: ModelManifest, model: AdaptedModel, blocks: list[Block]) -> Topology:
    """The topology of the whole manifest: the base's under the manifest's names, and the adapters' blocks."""
    renamed = tuple(_renamed(block, model.names) for block in topology.blocks)
    return replace(topology, blocks=renamed + tuple(blocks), parameters=manifest.parameters)


def _renamed(block: Block, names: dict[str, str]) -> Block:
    if block.view is None or names.get(block.view.fqn, block.view.fqn) == block.view.fqn:
        return block
    return replace(block, view=replace(block.view, fqn=names[block.view.fqn]))
