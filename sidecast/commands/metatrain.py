"""``sidecast metatrain``: trains the nowcasters that are shipped, or others like them."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

from sidecast.errors import ConfigError
from sidecast.graphs.registry import LAYOUTS
from sidecast.metatraining.presets import PRESETS
from sidecast.metatraining.recipe import NOWCASTERS
from sidecast.metatraining.running import metatrain
from sidecast.metatraining.trajectories import TrajectoryStore


def add_parser(subparsers: Any) -> None:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "metatrain",
        help="train nowcasters on many small models",
        description="Trains many small models, keeps their states, and trains nowcasters to predict the averages of "
        "states that come later. The network that is written is the one whose predictions had the lowest loss on runs "
        "that it was not trained on. The same command goes on where it was stopped.",
    )
    parser.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        default="default",
        help="sizes and steps: ci takes seconds (default: default)",
    )
    parser.add_argument(
        "--nowcasters", nargs="+", choices=NOWCASTERS, default=list(NOWCASTERS), help="which to train (default: all)"
    )
    parser.add_argument("--layout", choices=LAYOUTS, help="of the graphs (default: the preset's, symmetric)")
    parser.add_argument("--seed", type=int, default=0, help="of the networks (default 0)")
    parser.add_argument("--out", type=Path, required=True, help="folder of trajectories and weights")
    parser.add_argument("--max-gib", type=float, default=4.0, help="room for trajectories (default 4)")
    parser.add_argument("--threads", type=int, default=1, help="to compute with (default 1)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Trains what is missing; returns the exit status."""
    if args.threads < 1:
        raise ConfigError(f"--threads is {args.threads}; it must be at least 1")
    if not args.max_gib > 0:
        raise ConfigError(f"--max-gib is {args.max_gib}; it must be above 0")
    torch.set_num_threads(args.threads)
    preset = PRESETS[args.preset]
    recipes = [preset.recipe(name, layout=args.layout, seed=args.seed) for name in dict.fromkeys(args.nowcasters)]
    try:
        metatrain(preset, recipes, TrajectoryStore(args.out, int(args.max_gib * 2**30)), args.out, _report)
    except KeyboardInterrupt:
        sys.stderr.write(f"stopped; the same command goes on from what is in {args.out}\n")
        return 130
    return 0


def _report(line: str) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')}  {line}\n")
    sys.stderr.flush()
