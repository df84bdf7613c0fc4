"""``sidecast status``: what a running service is doing."""

from __future__ import annotations

import argparse
import json
import sys
import threading
from typing import Any

from sidecast.errors import ConfigError, SidecastError, printable
from sidecast.nowcaster_service.commands.connection import add_options, connected
from sidecast.nowcaster_service.config import ServiceConfig

MIN_WATCH_S, MAX_WATCH_S = 0.1, 86_400.0


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "status",
        help="show what a running service is doing",
        description="Asks a running service for its sessions: history, nowcasts, jumps applied and rolled back.",
    )
    default = f"{ServiceConfig.host}:{ServiceConfig.port}"
    parser.add_argument("endpoint", nargs="?", default=default, help="HOST:PORT (default: %(default)s)")
    add_options(parser)
    parser.add_argument("--timeout-s", type=float, default=5.0, help="how long to wait (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="write everything as one line of JSON")
    parser.add_argument(
        "--watch", type=float, metavar="SECONDS", help="ask again and again, so many seconds after each answer"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.watch is None:
        return _show(args)
    if not MIN_WATCH_S <= args.watch <= MAX_WATCH_S:
        raise ConfigError(f"--watch is {args.watch:g} s; allowed: {MIN_WATCH_S:g} to {MAX_WATCH_S:g}")
    pause = threading.Event()
    # A terminal shows the newest answer alone; a file or a pipe gets one after another.
    begins_anew = "\x1b[H\x1b[2J" if sys.stdout.isatty() and not args.json else ""
    try:
        while True:
            sys.stdout.write(begins_anew)
            try:
                _show(args)
            except SidecastError as error:
                # It may be back when it is asked next.
                sys.stderr.write(f"sidecast: {printable(str(error))}\n")
            sys.stdout.flush()
            pause.wait(args.watch)
    except KeyboardInterrupt:
        return 0


def _show(args: argparse.Namespace) -> int:
    from sidecast.protos import nowcast_pb2 as pb

    with connected(args.endpoint, args) as service:
        reply = service.stub.Status(pb.StatusRequest(), timeout=args.timeout_s, metadata=service.metadata)
    sys.stdout.write(as_json(reply) if args.json else render(reply))
    # So that a health check sees it: sessions are kept, and nothing comes of them.
    return 1 if reply.engines_fault else 0


def as_json(reply: object) -> str:
    """The reply as one line of JSON, in the names of ``StatusReply``; protobuf writes 64-bit numbers as strings."""
    from sidecast.nowcaster_service.overview.fields import as_fields
    from sidecast.protos import nowcast_pb2 as pb

    assert isinstance(reply, pb.StatusReply)
    return json.dumps(as_fields(reply)) + "\n"


def render(reply: object) -> str:
    """The reply as text for people."""
    from sidecast.protos import nowcast_pb2 as pb

    assert isinstance(reply, pb.StatusReply)
    lines = [
        f"sidecast {reply.service_version}, up {reply.uptime_seconds:.0f} s, "
        f"history {reply.history_bytes / 2**20:.1f} of {reply.history_budget_bytes / 2**20:.0f} MiB, "
        f"{len(reply.sessions)} session(s)"
    ]
    if reply.engines_fault:
        lines.append(f"no nowcasts: {reply.engines_fault}")
    if any(queue.is_busy for queue in reply.queues):
        lines.append("engines      " + ", ".join(_queue(item) for item in reply.queues if item.is_busy))
    for item in reply.sessions:
        owner = f"  (tenant {item.tenant})" if item.tenant else ""
        history = ", ".join(str(step) for step in item.history_steps) or "empty"
        lines += [
            f"run {item.run_id}{owner}" + (f"  (session {item.session_id})" if item.session_id else ""),
            f"  model       {item.num_parameters:,} parameters, {item.num_joined} of {item.world_size} ranks joined",
            f"  predictor   {item.predictor}",
            *(["  paused      nothing is applied until `sidecast resume`"] if item.is_paused else []),
            f"  history     {len(item.history_steps)} of {item.context_len} states (steps {history}), "
            f"epoch {item.epoch}",
            f"  snapshots   {item.num_committed} committed, {item.num_aborted} aborted{_newest(item)}",
            f"  nowcasts    {item.num_published} published, {item.num_failed} not made",
            *([f"  read-outs   {', '.join(map(_read_out, item.read_outs))}"] if item.read_outs else []),
            *(f"  probe       {text}" for text in _probe(item)),
            *([f"  best kept   {', '.join(map(_kept, item.probe.kept))}"] if item.probe.kept else []),
            f"  {'pushes' if item.policy == 'push' else 'jumps':<10}  {item.num_applied} applied, "
            f"{item.num_accepted} accepted, {item.num_rolled_back} rolled back, {item.num_rejected} rejected",
            f"  last seen   {item.idle_seconds:.1f} s ago",
        ]
    return "\n".join(lines) + "\n"


def _queue(item: Any) -> str:
    return item.work + (f" of {item.run_id}" if item.run_id else "") + f" ({item.num_waiting} waiting)"


def _newest(item: Any) -> str:
    if not item.HasField("snapshot_step"):
        return ""
    age = f", {item.snapshot_age_seconds:.0f} s ago" if item.HasField("snapshot_age_seconds") else ""
    return f"; the newest of step {item.snapshot_step}{age}"


def _probe(item: Any) -> list[str]:
    """What there is to say of a run's probe, a line each."""
    lines = []
    if item.probe.points:
        newest = item.probe.points[-1]
        ranked = sorted(newest.losses.items(), key=lambda pair: pair[1])
        lines.append(", ".join(f"{name} {loss:.5f}" for name, loss in ranked) + f" at step {newest.step}")
    return [*lines, *([item.probe.fault] if item.probe.fault else [])]


def _kept(item: Any) -> str:
    return f"{item.name} of step {item.step} ({item.probe_loss:.5f})"


def _read_out(item: Any) -> str:
    if item.num_snapshots == 0:
        return f"{item.name} (no state yet)"
    return f"{item.name} of step {item.step} ({item.num_snapshots} states since step {item.begin_step})"
