"""``sidecast graph``: draws a model's neural graph."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from torch import Tensor

from sidecast.errors import ConfigError
from sidecast.graphs import Topology, build_topology, graph_builders
from sidecast.graphs.pictures.html import picture_html
from sidecast.graphs.pictures.png import picture_png
from sidecast.graphs.pictures.weight_colours import ReadTensor
from sidecast.graphs.registry import LAYOUTS
from sidecast.manifest import ModelManifest


def add_parser(subparsers: Any) -> None:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "graph",
        help="draw a model's neural graph as HTML or PNG",
        description="Draws the blocks of a model's neural graph as an adjacency map and its layers as a flow. "
        "With a snapshot, the map shows the weights.",
    )
    parser.add_argument("model", type=Path, metavar="MODEL_DIR_OR_CONFIG", help="a model's folder, or its config.json")
    parser.add_argument("--out", type=Path, required=True, help="file to write; .html or .png")
    parser.add_argument("--layout", choices=LAYOUTS, help="default: official where the family has it, else symmetric")
    parser.add_argument("--snapshot", type=Path, help="safetensors file of weights; default: those in the folder")
    parser.add_argument("--unknown-parameters", choices=("error", "isolate"), default="error")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Draws the graph; returns the exit status."""
    if args.out.suffix not in (".html", ".png"):
        raise ConfigError(f"--out is {str(args.out)!r}; its name must end in .html or .png")
    config = _read_config(args.model)
    files = [args.snapshot] if args.snapshot is not None else _weight_files(args.model)
    manifest = ModelManifest.from_shapes(_shapes(files) if files else _shapes_on_meta(config), config)
    layout = args.layout or _default_layout(config)
    topology = build_topology(manifest, layout, unknown_parameters=args.unknown_parameters)
    read = _reader(files) if files else None
    if args.out.suffix == ".html":
        args.out.write_text(picture_html(topology, read), encoding="utf-8")
    else:
        args.out.write_bytes(picture_png(topology, read))
    sys.stdout.write(_summary(topology, args.out))
    return 0


def _summary(topology: Topology, out: Path) -> str:
    lines = [
        f"{topology.family}, {topology.layout}: {topology.num_nodes:,} nodes, {topology.num_edges:,} edges -> {out}"
    ]
    if topology.absent:
        lines.append(
            f"{len(topology.absent)} parameters are absent (frozen) and have no edges: {topology.absent[0]} ..."
        )
    return "\n".join(lines) + "\n"


def _read_config(model: Path) -> dict[str, Any]:
    path = model / "config.json" if model.is_dir() else model
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read a model's configuration from {str(path)!r}: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{str(path)!r} holds a {type(config).__name__}; a model's configuration is an object")
    return config


def _default_layout(config: dict[str, Any]) -> str:
    builder = graph_builders().get(str(config.get("model_type")))
    return LAYOUTS[0] if builder is None or LAYOUTS[0] in builder.layouts else LAYOUTS[1]


def _weight_files(model: Path) -> list[Path]:
    return sorted(model.glob("*.safetensors")) if model.is_dir() else []


def _shapes(files: list[Path]) -> list[tuple[str, tuple[int, ...]]]:
    from safetensors import SafetensorError, safe_open

    shapes = []
    for path in files:
        try:
            with safe_open(path, framework="pt") as archive:
                shapes += [(name, tuple(archive.get_slice(name).get_shape())) for name in archive.keys()]  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"cannot read weights from {str(path)!r}: {error}") from error
    return shapes


def _reader(files: list[Path]) -> ReadTensor:
    from safetensors import safe_open

    def read(fqn: str) -> Tensor | None:
        for path in files:
            with safe_open(path, framework="pt") as archive:
                if fqn in archive.keys():  # noqa: SIM118
                    tensor: Tensor = archive.get_tensor(fqn)
                    return tensor
        return None

    return read


def _shapes_on_meta(config: dict[str, Any]) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the architecture that the configuration names, without weights."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ConfigError("a model's shapes are read from its safetensors files, or else need transformers") from error
    architectures = config.get("architectures") or [_causal_lm_of(config.get("model_type"))]
    model_class = getattr(transformers, str(architectures[0]), None)
    if model_class is None:
        raise ConfigError(
            f"the configuration has architectures={architectures[0]!r} and model_type={config.get('model_type')!r}; "
            "without safetensors files it must name a class of transformers, or the type of a causal language model"
        )
    try:
        with torch.device("meta"):
            model = model_class(model_class.config_class.from_dict(config))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"transformers cannot make a {architectures[0]} of this configuration: {error}") from error
    return [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]


def _causal_lm_of(model_type: object) -> str | None:
    """The class of causal language models of that type, for a configuration that was written by hand."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(str(model_type))
    return name if isinstance(name, str) else None
