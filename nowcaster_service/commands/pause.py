"""``sidecast pause`` and ``sidecast resume``: a run applies nothing for a while, and trains on."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sidecast.errors import printable
from sidecast.nowcaster_service.commands.connection import add_options, connected
from sidecast.nowcaster_service.commands.export import RunAddress, read_run_file
from sidecast.nowcaster_service.config import ServiceConfig

_RUN = "file of the job (nowcaster.run_file), or the run's id, where the service has --page-control"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    add_parser_of(
        subparsers,
        "pause",
        "let a running job apply no jumps or pushes",
        "From the run's next vote on, no rank applies a jump or a push, until `sidecast resume`. Training, snapshots "
        "and read-outs go on; a jump on probation is still judged. Restarts of the job or the service change nothing, "
        "unless the job stays away until its session has expired.",
    )


def add_parser_of(
    subparsers: argparse._SubParsersAction[argparse.ArgumentParser], name: str, help: str, description: str
) -> None:
    """Adds one of the two commands."""
    parser = subparsers.add_parser(name, help=help, description=description)
    parser.add_argument("run_name", metavar="RUN", help=_RUN)
    parser.add_argument("--endpoint", metavar="HOST:PORT", help="of the service (default: as RUN says)")
    add_options(parser)
    parser.add_argument("--timeout-s", type=float, default=5.0, help="how long to wait (default: %(default)s)")
    parser.set_defaults(run=run, is_paused=name == "pause")


def run(args: argparse.Namespace) -> int:
    """Asks the service, and prints what that has changed.

    Returns:
        The exit status, 0.

    Raises:
        SidecastError: The service does not answer, or refuses.
        ConfigError: The file of the run is none, or another option cannot be used.
    """
    from sidecast.protos import nowcast_pb2 as pb

    path = Path(args.run_name)
    address = read_run_file(path) if path.is_file() else RunAddress(args.run_name, "", "")
    endpoint = args.endpoint or address.endpoint or f"{ServiceConfig.host}:{ServiceConfig.port}"
    request = pb.PauseRequest(run_id=address.run_id, is_paused=args.is_paused)
    with connected(endpoint, args, address.run_secret) as service:
        reply = service.stub.Pause(request, timeout=args.timeout_s, metadata=service.metadata)
    state = "paused" if args.is_paused else "not paused"
    when = "from its next vote on" if reply.has_changed else "as it was before"
    sys.stdout.write(printable(f"run {address.run_id} is {state}, {when}") + "\n")
    return 0
