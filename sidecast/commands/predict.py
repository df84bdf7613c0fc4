"""``sidecast predict``: one nowcast offline, from saved checkpoints."""

from __future__ import annotations

import argparse
import math
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sidecast.assignments import parse_assignment
from sidecast.checkpoints.checkpoint import Checkpoint, read_json_object
from sidecast.checkpoints.opening import open_checkpoint
from sidecast.checkpoints.output import check_output, missing_config, write_nowcast
from sidecast.checkpoints.series import check_series, with_shared_aliases
from sidecast.checkpoints.staging import StagedHistory, manifest_of, stage_history
from sidecast.checkpoints.steps import Step
from sidecast.commands.family_graph import described_by_module, graph_config
from sidecast.commands.graph_check import load_module
from sidecast.commands.names_file import with_names
from sidecast.errors import ConfigError, one_line, printable
from sidecast.graphs import manifest_of_module
from sidecast.graphs.adapters import adapted_modules
from sidecast.manifest import ModelManifest
from sidecast.predictors.base import ModelPredictor, Predictor, check_context_len, check_horizon
from sidecast.predictors.file_workspace import predict_with_files
from sidecast.predictors.registry import create_predictor

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_WAYS_OUT = "give the model as --module, or use a predictor without a graph (linear, average, rank1, wnn)"

_DESCRIPTION = """\
Predicts where the weights will be some checkpoints from now, from at least two checkpoints that you saved at equal
distances, and writes the prediction as a checkpoint of its own. The optimizer state is not predicted.

A checkpoint is a Hugging Face model directory, a PEFT adapter's, a .safetensors file, a DeepSpeed checkpoint folder
(global_step200, or universal) of any ZeRO stage, or a folder of torch.distributed.checkpoint (FSDP2, torchtitan,
accelerate). DeepSpeed itself need not be installed.

Steps are read from trainer_state.json and from the names of files and folders; their order and spacing is checked.
"""
_EPILOG = """\
example, 5 intervals of 200 steps ahead:
  sidecast predict checkpoint-200 checkpoint-400 checkpoint-600 --horizon 5 --out nowcast
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Adds the ``predict`` command to the main parser's sub-parsers."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "predict",
        help="make one nowcast offline from saved checkpoints",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "checkpoints", nargs="+", type=Path, metavar="CHECKPOINT", help="saved checkpoints, oldest first"
    )
    parser.add_argument(
        "--steps",
        metavar="A,B,C",
        help="the steps that the checkpoints are of, where neither their files nor their names tell, or tell wrongly",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the predicted checkpoint")
    parser.add_argument("--predictor", default="linear", metavar="NAME", help="how to predict (default: linear)")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="weights of a trained predictor, such as NiNo")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of the predictor; may be given several times",
    )
    parser.add_argument(
        "--horizon",
        type=int,
        metavar="K",
        help="how far ahead, in intervals between the given checkpoints (default: the predictor's own)",
    )
    parser.add_argument(
        "--weight",
        type=float,
        default=1.0,
        metavar="W",
        help="fraction of the predicted jump to apply, above 0 and up to 1 (default: 1)",
    )
    parser.add_argument(
        "--dtype",
        choices=sorted(_DTYPES),
        help="of the written weights (default: as in the newest checkpoint; float32 for DeepSpeed checkpoints)",
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="the model's config.json, where the checkpoints have none; copied to the output, but not beside adapters",
    )
    parser.add_argument(
        "--module",
        metavar="MODULE:FUNCTION",
        help="a Python function that gives (module, example_inputs) of the model, for predictors that need its graph",
    )
    parser.add_argument(
        "--names",
        type=Path,
        metavar="FILE",
        help="lines PATTERN -> REPLACEMENT, as in re.sub: from the checkpoints' names to those of the configuration's "
        "family, for predictors that need its graph",
    )
    parser.add_argument(
        "--scratch", type=Path, metavar="DIR", help="folder for temporary files as large as the checkpoints' weights"
    )
    parser.add_argument("--force", action="store_true", help="overwrite files in the output folder")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Makes the nowcast and prints a summary.

    Returns:
        The exit status, 0.

    Raises:
        ConfigError: Something that the user gave cannot be used; one line says what.
    """
    if not 0.0 < args.weight <= 1.0:
        raise ConfigError(f"--weight is {args.weight:g}; it must be above 0 and at most 1")
    if args.horizon is not None:
        check_horizon("--horizon", args.horizon, "interval between checkpoints")
    try:
        lines = _predict(args)
    except OSError as error:
        raise ConfigError(f"cannot read the checkpoints or write the nowcast: {one_line(error)}") from error
    sys.stdout.write("\n".join(map(printable, lines)) + "\n")
    return 0


def _predict(args: argparse.Namespace) -> list[str]:
    """Makes the nowcast; the lines of its summary."""
    check_output(args.out, args.checkpoints, args.force)
    predictor = create_predictor(args.predictor, weights=args.weights, options=_options(args.option))
    horizon_intervals = predictor.max_horizon if args.horizon is None else args.horizon
    config = read_json_object(args.config) if args.config is not None else None
    checkpoints = with_shared_aliases([open_checkpoint(path, config) for path in args.checkpoints])
    steps = check_series(checkpoints, _steps(args.steps))
    # Before anything large is copied; the predictor itself would say so only afterwards.
    check_context_len(predictor, len(checkpoints), f"{len(checkpoints)} checkpoints given")
    newest = checkpoints[-1]
    manifest = _with_graph(manifest_of(newest, config), predictor, args.module, args.names)
    folder = _scratch_folder(args)
    with torch.no_grad(), tempfile.TemporaryDirectory(prefix=".sidecast-predict-", dir=folder) as scratch:
        staged = stage_history(checkpoints, manifest, Path(scratch))
        predict_with_files(predictor, staged.history, horizon_intervals, staged.delta, Path(scratch))
        path = write_nowcast(
            newest, staged.change_of, args.out, weight=args.weight, dtype=_DTYPES.get(args.dtype), config=config
        )
        missing = missing_config(newest, config)
        return [
            *_inputs_summary(checkpoints, steps),
            f"predictor  {predictor.name}, horizon {horizon_intervals} intervals"
            f"{_horizon_steps(steps, horizon_intervals)}, weight {args.weight:g}",
            *_jump_summary(staged, args.weight),
            f"written    {path}",
            *([f"           without {missing}, which no loader does without: copy yours"] if missing else []),
        ]


def _with_graph(manifest: ModelManifest, predictor: Predictor, module: str | None, names: Path | None) -> ModelManifest:
    """The manifest with what a predictor on graphs draws the model from."""
    if not isinstance(predictor, ModelPredictor):
        if module is not None or names is not None:
            option = "--names" if module is None else "--module"
            raise ConfigError(f"{option} describes a graph, and predictor {predictor.name!r} has none; leave it out")
        return manifest
    if module is not None and names is not None:
        raise ConfigError("--names is about a family's names, and --module has its own; give one of the two")
    if names is not None:
        manifest = with_names(manifest, names)
    if module is None:
        return replace(manifest, config=graph_config(manifest.config, adapted_modules(manifest), ways_out=_WAYS_OUT))
    return described_by_module(manifest, manifest_of_module(*load_module(module)))


def _steps(text: str | None) -> list[int] | None:
    if text is None:
        return None
    parts = text.split(",")
    if not all(re.fullmatch(r"[0-9]{1,18}", part.strip()) for part in parts):
        raise ConfigError(f"--steps is {text!r}; it must be integers with commas between them, such as 200,400,600")
    return [int(part) for part in parts]


def _options(pairs: Sequence[str]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for pair in pairs:
        assignment = parse_assignment(pair)
        if assignment is None:
            raise ConfigError(f"--option is {pair!r}; KEY=VALUE is needed")
        options |= [assignment]
    return options


def _scratch_folder(args: argparse.Namespace) -> Path:
    if args.scratch is not None:
        if not args.scratch.is_dir():
            raise ConfigError(f"--scratch {args.scratch} is no folder; give one that exists")
        return Path(args.scratch)
    # The output's file system: it has to have room for a model anyway, and /tmp is often kept in memory.
    args.out.absolute().parent.mkdir(parents=True, exist_ok=True)
    return Path(args.out.absolute().parent)


def _inputs_summary(checkpoints: Sequence[Checkpoint], steps: Sequence[Step | None]) -> list[str]:
    newest = checkpoints[-1]
    num_trainable = sum(math.prod(tensor.shape) for tensor in newest.tensors.values() if tensor.trainable)
    lines = [
        f"read       {checkpoint.path} ({checkpoint.description}, "
        + ("step unknown)" if step is None else f"{step.unit} {step.number} by {step.source})")
        for checkpoint, step in zip(checkpoints, steps, strict=True)
    ]
    if None in steps:
        lines.append("           taken as equally spaced, oldest first, as given: not all steps are known (--steps)")
    return [*lines, f"           {len(newest.tensors)} tensors, {num_trainable:,} trainable elements each"]


def _horizon_steps(steps: Sequence[Step | None], horizon_intervals: int) -> str:
    newest, before = steps[-1], steps[-2]
    if newest is None or before is None:
        return ""
    return f" = {horizon_intervals * (newest.number - before.number)} {newest.unit}s"


def _jump_summary(staged: StagedHistory, weight: float) -> list[str]:
    """The size of the applied jump relative to the weights, by group: tensors whose names differ in numbers only."""
    manifest = staged.history.manifest
    sums: dict[str, list[float]] = {}
    for spec in manifest.parameters:
        start = manifest.offsets[spec.fqn]
        base = staged.history.states[-1][start : start + spec.numel]
        change = staged.change_of(spec.fqn)
        jump_norm = 0.0 if change is None else weight * float(torch.linalg.vector_norm(change, dtype=torch.float64))
        base_norm = float(torch.linalg.vector_norm(base, dtype=torch.float64))
        for group in (re.sub(r"(?<![^.])[0-9]+(?![^.])", "*", spec.fqn), "all"):
            entry = sums.setdefault(group, [0.0, 0.0, 0])
            entry[0] += jump_norm**2
            entry[1] += base_norm**2
            entry[2] += 1
    groups = [*(group for group in sums if group != "all"), "all"]
    width = max(len("tensors"), *(len(group) for group in groups))
    lines = [f"{'tensors':<{width}}  count  jump / weights"]
    for group in groups:
        jump, base_square, count = sums[group]
        ratio = math.sqrt(jump / base_square) if base_square else math.nan
        lines.append(f"{group:<{width}}  {count:5.0f}  {ratio:14.3e}")
    return lines
