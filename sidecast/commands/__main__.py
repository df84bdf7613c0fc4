"""The ``sidecast`` command."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import version

from sidecast.errors import SidecastError, printable

# By name: those that belong to the service, or to training jobs, are loaded only where they are asked for.
COMMANDS = {
    "serve": "sidecast.nowcaster_service.commands.serve",
    "status": "sidecast.nowcaster_service.commands.status",
    "export": "sidecast.nowcaster_service.commands.export",
    "pause": "sidecast.nowcaster_service.commands.pause",
    "resume": "sidecast.nowcaster_service.commands.resume",
    "predict": "sidecast.commands.predict",
    "graph": "sidecast.commands.graph",
    "evaluate": "sidecast.commands.evaluate",
    "report": "sidecast.trainer.report.command",
    "metatrain": "sidecast.commands.metatrain",
    "doctor": "sidecast.commands.doctor",
}


def build_parser(commands: Iterable[str] = COMMANDS) -> argparse.ArgumentParser:
    """The parser with its subcommands.

    Args:
        commands: Those to offer.
    """
    parser = argparse.ArgumentParser(
        prog="sidecast",
        description="Nowcasting for distributed training: predicts where the weights will be, without stalling "
        "the run. Training scripts use it through `sidecast.attach(engine)`; this command runs the service beside "
        "them and the tools around it.",
    )
    parser.add_argument("--version", action="version", version=f"sidecast {version('sidecast')}")
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name in commands:
        importlib.import_module(COMMANDS[name]).add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand; refusals become one line on stderr and exit status 2."""
    argv = sys.argv[1:] if argv is None else argv
    # A container's health check runs `status` every few seconds: it must not import the other commands' PyTorch.
    named = [name for name in COMMANDS if argv[:1] == [name]]
    args = build_parser(named or COMMANDS).parse_args(argv)
    try:
        return int(args.run(args))
    except SidecastError as error:
        sys.stderr.write(f"sidecast: {printable(str(error))}\n")
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
