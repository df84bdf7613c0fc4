"""``sidecast status``: what a running service is doing."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sidecast.errors import ConfigError, SidecastError
from sidecast.nowcaster_service.config import ServiceConfig, read_file, read_token


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "status",
        help="show what a running service is doing",
        description="Asks a running service for its sessions: history, nowcasts, jumps applied and rolled back.",
    )
    default = f"{ServiceConfig.host}:{ServiceConfig.port}"
    parser.add_argument("endpoint", nargs="?", default=default, help="HOST:PORT (default: %(default)s)")
    parser.add_argument("--token-file", type=Path, help="file holding the shared secret")
    parser.add_argument("--tls-ca", type=Path, help="PEM certificate of the authority that signed the service's")
    parser.add_argument("--tls-cert", type=Path, help="PEM certificate to show, where the service asks for one")
    parser.add_argument("--tls-key", type=Path, help="its PEM private key")
    parser.add_argument("--timeout-s", type=float, default=5.0, help="how long to wait (default: %(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import grpc

    from sidecast.protos import nowcast_pb2 as pb
    from sidecast.protos import nowcast_pb2_grpc

    # Hosts often have proxies for the web, which cannot carry this. And a list of many sessions is long.
    options = [("grpc.enable_http_proxy", 0), ("grpc.max_receive_message_length", -1)]
    if (args.tls_cert is None) != (args.tls_key is None) or (args.tls_cert is not None and args.tls_ca is None):
        raise ConfigError("--tls-cert and --tls-key go together, and with --tls-ca; one of them is missing")
    if args.tls_ca is None:
        channel = grpc.insecure_channel(args.endpoint, options)
    else:
        authority, key, certificate = (
            None if path is None else read_file(option, path)
            for option, path in (("--tls-ca", args.tls_ca), ("--tls-key", args.tls_key), ("--tls-cert", args.tls_cert))
        )
        channel = grpc.secure_channel(args.endpoint, grpc.ssl_channel_credentials(authority, key, certificate), options)
    metadata = []
    if args.token_file is not None:
        metadata.append(("authorization", f"Bearer {read_token('--token-file', args.token_file)}"))
    with channel:
        try:
            stub = nowcast_pb2_grpc.NowcasterStub(channel)
            reply = stub.Status(pb.StatusRequest(), timeout=args.timeout_s, metadata=metadata)
        except grpc.RpcError as error:
            raise SidecastError(f"no answer from {args.endpoint}: {error.code().name}: {error.details()}") from error
    sys.stdout.write(render(reply))
    # So that a health check sees it: sessions are kept, and nothing comes of them.
    return 1 if reply.engines_fault else 0


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
    for item in reply.sessions:
        history = ", ".join(str(step) for step in item.history_steps) or "empty"
        lines += [
            f"run {item.run_id}" + (f"  (session {item.session_id})" if item.session_id else ""),
            f"  model       {item.num_parameters:,} parameters, {item.num_joined} of {item.world_size} ranks joined",
            f"  predictor   {item.predictor}",
            f"  history     {len(item.history_steps)} of {item.context_len} states (steps {history}), "
            f"epoch {item.epoch}",
            f"  snapshots   {item.num_committed} committed, {item.num_aborted} aborted",
            f"  nowcasts    {item.num_published} published, {item.num_failed} not made",
            f"  jumps       {item.num_applied} applied, {item.num_rolled_back} rolled back",
            f"  last seen   {item.idle_seconds:.1f} s ago",
        ]
    return "\n".join(lines) + "\n"
