"""Low-rank adapters: which of a manifest's parameters they are, and where they go in the graph of the model they adapt.

Only what is trained is in a manifest. So the adapted, frozen matrices have nodes and no edges, and an adapter's two
matrices run through one node for each rank, from the inputs to the outputs of the matrix that they adapt.

Source: LoRA (arXiv 2106.09685); names as in the PEFT library.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from sidecast.errors import ConfigError
from sidecast.graphs.assembler import MatrixSlice, TopologyAssembler
from sidecast.graphs.topology import Block, EdgeType, NodeRange, Topology
from sidecast.manifest import NAMES_KEY, ModelManifest, ParameterSpec, unwrapped_name

_WRAPPER = "base_model.model."
_DATA_PARALLEL = "module."
# PEFT leaves the adapter's name out of what it saves.
_FACTOR = re.compile(r"^(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.weight$")
# Norms of models that were converted from TensorFlow; transformers renames them when it loads one.
_TENSORFLOW_NORMS = {"gamma": "weight", "beta": "bias"}
_ADAPTER_NAME = re.compile(r"(\.lora_[^.]+)(?:\.(?!weight$|bias$)[^.]+)?(?:\.weight)?$")
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
    given = manifest.config.get(NAMES_KEY)
    family_names = given if isinstance(given, Mapping) else {}
    names = {name: name for name in (*(spec.fqn for spec in manifest.parameters), *manifest.aliases)}
    names = {name: unwrapped_name(str(family_names.get(name, name))) for name in names}
    # A module may well be called "module"; a wrapper has all of them.
    while names and all(plain.startswith(_DATA_PARALLEL) for plain in names.values()):
        names = {name: plain.removeprefix(_DATA_PARALLEL) for name, plain in names.items()}
    names = {name: plain.removeprefix(_WRAPPER) for name, plain in names.items()}
    if manifest.config.get("model_type") == "bert":
        names = {name: _with_torch_norm(plain) for name, plain in names.items()}
    return names


def _described(names: Mapping[str, str], config: Mapping[str, Any]) -> dict[str, str]:
    """``{name in the manifest: name in the description}`` of a module that was run or traced, where that has it.

    A description has the names of its module, adapters and wrappers included; saving leaves parts of them out.

    Args:
        names: As ``_unwrapped`` gives them.
        config: The manifest's configuration.
    """
    parameters, operations = config.get("parameters"), config.get("operations")
    if config.get("model_type") == "module_graph" and isinstance(operations, list):
        modules = {each.get("module") for each in operations if isinstance(each, dict)}
        return {name: name for name in names if name.rpartition(".")[0] in modules}
    if config.get("model_type") != "axis_graph" or not isinstance(parameters, Mapping):
        return {}
    by_saved_name: dict[str, list[str]] = {}
    for name in parameters:
        by_saved_name.setdefault(_as_saved(unwrapped_name(name).removeprefix(_WRAPPER)), []).append(name)
    found = {}
    for name, plain in names.items():
        alike = [name] if name in parameters else by_saved_name.get(_as_saved(plain), [])
        if len(alike) == 1:
            found[name] = alike[0]
    return found


def _as_saved(name: str) -> str:
    """A plain name as PEFT saves it, but for the ending of factors, which it keeps for some kinds only."""
    return _ADAPTER_NAME.sub(r"\1", _SAVED.sub("", name))


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
    described = _described(unwrapped, manifest.config)
    for spec in manifest.parameters:
        plain = described.get(spec.fqn) or _SAVED.sub("", unwrapped[spec.fqn])
        match = None if spec.fqn in described else _FACTOR.match(plain)
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
    unwrapped |= described
    aliases = {unwrapped[alias]: unwrapped.get(fqn, fqn) for alias, fqn in manifest.aliases.items()}
    return AdaptedModel(ModelManifest(tuple(base), manifest.config, aliases), tuple(adapters), names)


def adapted_modules(manifest: ModelManifest) -> tuple[str, ...]:
    """Names of the modules that a manifest's low-rank adapters adapt, without what wrappers add."""
    return tuple(adapter.module for adapter in take_apart(manifest).adapters)


def draw_adapter(assembler: TopologyAssembler, adapter: Adapter) -> list[Block]:
    """The blocks of one adapter, between nodes that the builder has drawn and new ones for the ranks.

    Raises:
        ConfigError: The builder has drawn no matrix of that name, or one of another shape.
    """
    placements = assembler.placements.get(f"{adapter.module}.weight")
    if not placements:
        raise ConfigError(
            f"adapter {adapter.down.fqn!r} adapts a matrix that its graph builder does not know; give the model with "
            "its adapters to sidecast.graphs.remember_graph before training, or as --module with saved ones"
        )
    rank, num_inputs = adapter.down.shape
    ranks = assembler.nodes(rank, f"{adapter.down.fqn}.ranks")
    # A matrix of several parts meets the same inputs in some of them, and the same outputs in others.
    read = {(each.first_input, each.input_step, len(each.inputs)): each for each in placements}
    written = {(each.first_output, each.output_step, len(each.outputs)): each for each in placements}
    known_inputs = sum(num_nodes for _, _, num_nodes in read)
    known_outputs = sum(num_nodes for _, _, num_nodes in written)
    if num_inputs != known_inputs or adapter.up.shape != (known_outputs, rank):
        raise ConfigError(
            f"adapter {adapter.down.fqn!r} maps {num_inputs} inputs to {adapter.up.shape[0]} outputs; "
            f"the matrix that it adapts has {known_inputs} and {known_outputs}"
        )
    blocks = []
    is_reversed = all(placement.is_reversed for placement in placements)
    for (first, step, _), placement in read.items():
        down = MatrixSlice(
            fqn=adapter.down.fqn,
            shape=adapter.down.shape,
            offset=first,
            input_stride=step,
            output_stride=num_inputs,
        )
        name = down.fqn if len(read) == 1 else f"{down.fqn}.columns{first}"
        blocks.append(_block(name, down, placement.inputs, ranks, is_reversed=is_reversed))
    for (first, step, _), placement in written.items():
        up = MatrixSlice(
            fqn=adapter.up.fqn,
            shape=adapter.up.shape,
            offset=first * rank,
            input_stride=1,
            output_stride=step * rank,
        )
        name = up.fqn if len(written) == 1 else f"{up.fqn}.rows{first}"
        blocks.append(_block(name, up, ranks, placement.outputs, is_reversed=placement.is_reversed))
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
