"""``sidecast graph``: draws a model's neural graph, and proves it on the network."""

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
from sidecast.checkpoints.transformers_models import model_of_config
from sidecast.commands.family_graph import graph_config
from sidecast.commands.graph_check import check_module, line_of_config, load_module
from sidecast.commands.names_file import with_names
from sidecast.errors import ConfigError
from sidecast.graphs import Topology, build_topology
from sidecast.graphs.adapters import adapted_modules
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
        help="draw a model's neural graph as HTML or PNG, or check it",
        description="Draws the blocks of a model's neural graph as an adjacency map and its layers as a flow. "
        "With a snapshot, the map shows the weights. With --check, runs the network before and after permutations that "
        "keep its graph, and fails if the output changes.",
    )
    parser.add_argument("model", type=Path, nargs="?", metavar="MODEL", help=_MODELS)
    parser.add_argument("--out", type=Path, help="file to write; .html or .png (default with --check: none)")
    parser.add_argument(
        "--check",
        action="store_true",
        help="prove the symmetric graph on the network: of MODEL's family at tiny widths, or of --module as it is",
    )
    parser.add_argument(
        "--module",
        metavar="MODULE:FUNCTION",
        help="in place of MODEL: a Python function that gives (module, example_inputs); its graph is checked",
    )
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
        help="what becomes of a parameter that this family's graph does not know: refuse the model, or give the "
        "parameter nodes of its own (default: error)",
    )
    parser.add_argument(
        "--names",
        type=Path,
        metavar="FILE",
        help="lines PATTERN -> REPLACEMENT, as in re.sub: from the names of the weights to those of MODEL's family",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Draws or checks the graph; returns the exit status."""
    if (args.model is None) == (args.module is None):
        raise ConfigError("give either MODEL or --module MODULE:FUNCTION")
    if args.out is None and not args.check:
        raise ConfigError("give --out FILE to draw the graph, or --check to check it")
    if args.out is not None and args.out.suffix not in (".html", ".png"):
        raise ConfigError(f"--out is {str(args.out)!r}; its name must end in .html or .png")
    if args.layout == LAYOUTS[0] and (args.check or args.module is not None):
        raise ConfigError(
            f"--layout is {args.layout!r}, which has the flaws of what was published; a check needs 'symmetric'"
        )
    if args.module is not None:
        if args.snapshot is not None:
            raise ConfigError("--snapshot shows the weights of MODEL; --module has none to show")
        if args.unknown_parameters is not None:
            raise ConfigError(
                "--unknown-parameters is about parameters that a family's graph does not know; --module has none"
            )
        if args.names is not None:
            raise ConfigError("--names is about a family's names, and --module has its own; leave it out")
        topology, line = check_module(*load_module(args.module))
        sys.stdout.write(f"{line}\n")
        if args.out is not None:
            _draw(topology, None, args.out)
        return 0
    for option, value in (
        ("--snapshot", args.snapshot),
        ("--unknown-parameters", args.unknown_parameters),
        ("--names", args.names),
    ):
        if args.out is None and value is not None:
            raise ConfigError(f"{option} is for a drawing; give --out FILE too, or leave it out")
    config, checkpoint = _open_model(args.model)
    if args.check:
        sys.stdout.write(f"{line_of_config(config, _adapted(checkpoint, args.names))}\n")
    if args.out is None:
        return 0
    if args.snapshot is not None:
        checkpoint = open_checkpoint(args.snapshot, config)
    drawn_from = graph_config(
        config,
        _adapted(checkpoint, args.names),
        ways_out="give the model as --module, in place of MODEL",
        is_checked=args.check,
    )
    if checkpoint is not None:
        manifest = manifest_of(checkpoint, drawn_from)
        manifest = manifest if args.names is None else with_names(manifest, args.names)
    elif args.names is None:
        manifest = _manifest_of_config(config, drawn_from)
    else:
        raise ConfigError(f"--names is about the names of weights, and {args.model} has none; leave it out")
    topology = build_topology(manifest, args.layout, unknown_parameters=args.unknown_parameters or "error")
    _draw(topology, checkpoint, args.out)
    return 0


def _adapted(checkpoint: Checkpoint | None, names: Path | None) -> tuple[str, ...]:
    """The modules that a checkpoint's adapters adapt, as the family names them."""
    if checkpoint is None:
        return ()
    manifest = ModelManifest.from_shapes(
        (name, tensor.shape) for name, tensor in checkpoint.tensors.items() if tensor.trainable
    )
    return adapted_modules(manifest if names is None else with_names(manifest, names))


def _draw(topology: Topology, checkpoint: Checkpoint | None, out: Path) -> None:
    read = None if checkpoint is None else _reader(checkpoint)
    picture = picture_html(topology, read).encode() if out.suffix == ".html" else picture_png(topology, read)
    try:
        with replacing(out) as partial:
            partial.write_bytes(picture)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written: {error.strerror}") from error
    sys.stdout.write(_summary(topology, out))


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
    try:
        has_weights = holds_weights(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    if has_weights:
        checkpoint = open_checkpoint(path)
        if checkpoint.config is None:
            raise ConfigError(f"{path} has no {CONFIG_FILE} with it; give one as the model, and this as --snapshot")
        return checkpoint.config, checkpoint
    config_file = path / CONFIG_FILE if path.is_dir() else path
    if config_file.suffix == ".json" and config_file.is_file():
        return read_json_object(config_file), None
    problem = "is no model that can be drawn" if path.exists() else "does not exist"
    raise ConfigError(f"{path} {problem}; give {_MODELS}")


def _reader(checkpoint: Checkpoint) -> ReadTensor:
    def read(fqn: str) -> Tensor | None:
        stored = checkpoint.tensors.get(fqn)
        return None if stored is None else stored.read()

    return read


def _manifest_of_config(config: Mapping[str, Any], drawn_from: Mapping[str, Any]) -> ModelManifest:
    """The parameters of the architecture that the configuration names, without weights."""
    model = model_of_config(config, device="meta")
    shapes = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    return ModelManifest.from_shapes(shapes, drawn_from)
