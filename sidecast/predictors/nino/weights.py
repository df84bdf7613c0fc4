"""Reads and writes the weights of NiNo and WNN+ networks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from sidecast.errors import ConfigError
from sidecast.graphs.registry import LAYOUTS
from sidecast.predictors.nino.config import NinoConfig
from sidecast.predictors.weights import load_tensors

_METADATA_KEY = "sidecast.nino"
_PUBLISHED_CONTEXT_LEN = 5
_TOKEN_POSITION_LAYER = "wte_pos_enc_layer"


@dataclass(frozen=True)
class NinoWeights:
    """A NiNo or WNN+ network: hyper-parameters and tensors that are known to fit each other.

    Attributes:
        config: Its hyper-parameters.
        tensors: Its fp32 tensors, by their published names.
        source: Where they came from, for messages.
        layout: Of the graphs that the network was trained on; None if the file does not say.
    """

    config: NinoConfig
    tensors: Mapping[str, Tensor]
    source: str
    layout: str | None = None

    def __post_init__(self) -> None:
        if self.layout is not None and self.layout not in LAYOUTS:
            raise ConfigError(f"weights file {self.source}: layout is {self.layout!r}; allowed: {', '.join(LAYOUTS)}")
        expected = self.config.shapes()
        _require_keys(self.source, set(self.tensors), set(expected))
        for name, shape in expected.items():
            if tuple(self.tensors[name].shape) != shape:
                raise ConfigError(
                    f"weights file {self.source}: {name} has shape {tuple(self.tensors[name].shape)}; "
                    f"{self.config} needs {shape}"
                )


def load_weights(path: Path) -> NinoWeights:
    """Loads a NiNo or WNN+ network.

    Args:
        path: A ``.safetensors`` file (ours, see ``save_weights``), or a ``.pt`` file in the published format: a
            dictionary with a ``state_dict``, or the state dictionary itself.

    Raises:
        ConfigError: The file is missing, unreadable, or not such a network; the message names the file and the keys.
    """
    tensors, metadata = load_tensors(path)
    config, layout = _stated(path, metadata) or (_published_config(str(path), tensors), None)
    return NinoWeights(config, tensors, str(path), layout)


def save_weights(path: Path, weights: NinoWeights) -> None:
    """Writes a network as a safetensors file that ``load_weights`` reads back with its hyper-parameters."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in weights.tensors.items()}
    stated = asdict(weights.config) if weights.layout is None else {**asdict(weights.config), "layout": weights.layout}
    # All under one key: the order of several is another one in each file.
    save_file(tensors, path, metadata={_METADATA_KEY: json.dumps(stated)})


def _stated(path: Path, metadata: Mapping[str, str]) -> tuple[NinoConfig, str | None] | None:
    if _METADATA_KEY not in metadata:
        return None
    try:
        stated = json.loads(metadata[_METADATA_KEY])
        layout = stated.pop("layout", None)
        return NinoConfig(**stated), layout
    except (AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"weights file {path}: bad {_METADATA_KEY!r} metadata: {error}") from error


def _published_config(source: str, tensors: Mapping[str, Tensor]) -> NinoConfig:
    """Hyper-parameters of published weights, which do not state theirs, from the shapes of their tensors."""
    positional = sorted(name for name in tensors if name.startswith(_TOKEN_POSITION_LAYER))
    if positional:
        raise ConfigError(
            f"weights file {source} has {positional[0]}, a token-position embedding for one vocabulary; "
            "expected the published variant without it (nino_no_posw.pt)"
        )
    default = NinoConfig(gnn=not any(name.startswith("edge_mlp.") for name in tensors))
    _require_keys(source, set(tensors), _named_layers(tensors, default))

    def size(name: str, dim: int) -> int:
        return tensors[name].shape[dim] if tensors[name].ndim > dim else 0

    common: dict[str, Any] = {
        "gnn": default.gnn,
        "context_len": _PUBLISHED_CONTEXT_LEN,
        "hidden_dim": size("layer_embed.weight", 1),
        "num_edge_types": size("layer_embed.weight", 0),
    }
    try:
        if not default.gnn:
            num_mlp_layers = _count(tensors, "edge_mlp.fc.")
            last = size(f"edge_mlp.fc.{2 * num_mlp_layers - 2}.weight", 0)
            return NinoConfig(**common, max_horizon=last, num_mlp_layers=num_mlp_layers)
        max_kernel_elements = max(1, size("edge_proj.fc.0.weight", 1) // _PUBLISHED_CONTEXT_LEN)
        return NinoConfig(
            **common,
            max_kernel_elements=max_kernel_elements,
            max_horizon=size("edge_out.fc.2.weight", 0) // max_kernel_elements,
            num_layers=_count(tensors, "gnn.convs."),
            lpe_dim=size("node_proj.fc.0.weight", 1),
        )
    except ConfigError as error:
        raise ConfigError(f"weights file {source}: {error}") from error


def _named_layers(tensors: Mapping[str, Tensor], default: NinoConfig) -> set[str]:
    """The keys of a network with as many layers as these tensors have, or else of the default one."""
    num_layers = _count(tensors, "gnn.convs.") or default.num_layers
    num_mlp_layers = max(2, _count(tensors, "edge_mlp.fc."))
    return set(NinoConfig(gnn=default.gnn, num_layers=num_layers, num_mlp_layers=num_mlp_layers).shapes())


def _count(tensors: Mapping[str, Tensor], prefix: str) -> int:
    return len({name[len(prefix) :].split(".")[0] for name in tensors if name.startswith(prefix)})


def _require_keys(source: str, found: set[str], expected: set[str]) -> None:
    for problem, names in (("lacks", expected - found), ("has unknown", found - expected)):
        if names:
            shown = ", ".join(sorted(names)[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            raise ConfigError(
                f"weights file {source} {problem} {shown}; expected the tensors of a NiNo network "
                "(layer_embed, node_proj, edge_proj, edge_out, gnn.*) or a WNN+ network "
                "(layer_embed, edge_proj, edge_mlp)"
            )
