"""``sidecast graph``: draws a model's neural graph."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sidecast.atomic_files import replacing
from sidecast.checkpoints.checkpoint import Checkpoint, read_json_object
from sidecast.checkpoints.huggingface import CONFIG_FILE
from sidecast.checkpoints.opening import holds_weights, open_checkpoint
from sidecast.checkpoints.staging import manifest_of
from sidecast.errors import ConfigError
from sidecast.graphs import Topology, build_topology, graph_builders
from sidecast.graphs.pictures.html import picture_html
from sidecast.graphs.pictures.png import picture_png
from sidecast.graphs.pictures.weight_colours import ReadTensor
from sidecast.graphs.registry import LAYOUTS
from sidecast.manifest import ModelManifest

_MODELS = (
    "a model's folder (Hugging Face or DeepSpeed), its config.json, or a .safetensors file with a config.json beside it"
)


def add_parser(subparsers: Any) -> None:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "graph",
        help="draw a model's neural graph as HTML or PNG",
        description="Draws the blocks of a model's neural graph as an adjacency map and its layers as a flow. "
        "With a snapshot, the map shows the weights.",
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help=_MODELS)
    parser.add_argument("--out", type=Path, required=True, help="file to write; .html or .png")
    parser.add_argument("--layout", choices=LAYOUTS, help="default: official where the family has it, else symmetric")
    parser.add_argument(
        "--snapshot",
        type=Path,
        metavar="CHECKPOINT",
        help="weights to show, saved in any way that sidecast predict reads (default: the model's own)",
    )
    parser.add_argument(
        "--unknown-parameters",
        choices=("error", "isolate"),
        default="error",
        help="what becomes of a parameter that this family's graph does not know: refuse the model, or give the "
        "parameter nodes of its own (default: %(default)s)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Draws the graph; returns the exit status."""
    if args.out.suffix not in (".html", ".png"):
        raise ConfigError(f"--out is {str(args.out)!r}; its name must end in .html or .png")
    config, checkpoint = _open_model(args.model)
    if args.snapshot is not None:
        checkpoint = open_checkpoint(args.snapshot)
    manifest = _manifest_of_config(config) if checkpoint is None else manifest_of(checkpoint, config)
    layout = args.layout or _default_layout(config)
    topology = build_topology(manifest, layout, unknown_parameters=args.unknown_parameters)
    read = None if checkpoint is None else _reader(checkpoint)
    picture = picture_html(topology, read).encode() if args.out.suffix == ".html" else picture_png(topology, read)
    try:
        with replacing(args.out) as partial:
            partial.write_bytes(picture)
    except OSError as error:
        raise ConfigError(f"--out {args.out} cannot be written: {error.strerror}") from error
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


def _open_model(path: Path) -> tuple[Mapping[str, Any], Checkpoint | None]:
    """A model's configuration, and its weights if there are any."""
    if holds_weights(path):
        checkpoint = open_checkpoint(path)
        if checkpoint.config is None:
            raise ConfigError(f"{path} has no {CONFIG_FILE} with it; give one as the model, and this as --snapshot")
        return checkpoint.config, checkpoint
    config_file = path / CONFIG_FILE if path.is_dir() else path
    if config_file.suffix == ".json" and config_file.is_file():
        return read_json_object(config_file), None
    problem = "is no model that can be drawn" if path.exists() else "does not exist"
    raise ConfigError(f"{path} {problem}; give {_MODELS}")


def _default_layout(config: Mapping[str, Any]) -> str:
    builder = graph_builders().get(str(config.get("model_type")))
    return LAYOUTS[0] if builder is None or LAYOUTS[0] in builder.layouts else LAYOUTS[1]


def _reader(checkpoint: Checkpoint) -> ReadTensor:
    def read(fqn: str) -> Tensor | None:
        stored = checkpoint.tensors.get(fqn)
        return None if stored is None else stored.read()

    return read


def _manifest_of_config(config: Mapping[str, Any]) -> ModelManifest:
    """The parameters of the architecture that the configuration names, without weights."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ConfigError("a model's shapes are read from its weights, or else need transformers") from error
    architectures = config.get("architectures") or [_causal_lm_of(config.get("model_type"))]
    model_class = getattr(transformers, str(architectures[0]), None)
    if model_class is None:
        raise ConfigError(
            f"the configuration has architectures={architectures[0]!r} and model_type={config.get('model_type')!r}; "
            "without weights it must name a class of transformers, or the type of a causal language model"
        )
    try:
        with torch.device("meta"):
            model = model_class(model_class.config_class.from_dict(dict(config)))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"transformers cannot make a {architectures[0]} of this configuration: {error}") from error
    shapes = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    return ModelManifest.from_shapes(shapes, config)


def _causal_lm_of(model_type: object) -> str | None:
    """The class of causal language models of that type, for a configuration that was written by hand."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(str(model_type))
    return name if isinstance(name, str) else None
