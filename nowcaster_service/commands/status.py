"""``sidecast status``: what a running service is doing."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from sidecast.errors import ConfigError, SidecastError
from sidecast.nowcaster_service.config import MAX_PORT, ServiceConfig, read_file, read_token


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
    host, _, port = args.endpoint.rpartition(":")
    if not host or not (port.isascii() and port.isdecimal() and 0 < int(port) <= MAX_PORT):
        raise ConfigError(f"endpoint is {args.endpoint!r}; allowed: HOST:PORT")
    # What fails is said here, once; gRPC would log it besides.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
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
            raise SidecastError(explained(args.endpoint, error.code(), error.details() or "")) from error
    sys.stdout.write(render(reply))
    # So that a health check sees it: sessions are kept, and nothing comes of them.
    return 1 if reply.engines_fault else 0


def explained(endpoint: str, code: object, details: str) -> str:
    """What a call that failed means, for people.

    Args:
        endpoint: That was called.
        code: gRPC's status.
        details: What gRPC, or the service, says of it.
    """
    import grpc

    # gRPC has one status for all that keeps a call from its service; only its words tell them apart.
    causes = {
        "Connection refused": "nothing listens there (is `sidecast serve` running, and on this port?)",
        "errors resolving": "the host's name is not known here",
        "No route to host": "no network leads there",
        "Network is unreachable": "no network leads there",
        "CERTIFICATE_VERIFY_FAILED": "its certificate is not of the authority in --tls-ca, or not for this host name",
        "Peer name": "its certificate is not for this host name",
        "CERTIFICATE_REQUIRED": "it asks for a certificate of the caller (--tls-cert, --tls-key)",
        "WRONG_VERSION_NUMBER": "it does not speak TLS: leave --tls-ca out",
        "Failed parsing HTTP/2": "what listens there does not speak gRPC",
        "Socket closed": "it ended the connection: it speaks TLS (--tls-ca), or asks for a certificate (--tls-cert)",
    }
    if code is grpc.StatusCode.UNAVAILABLE:
        why = next((why for words, why in causes.items() if words in details), " ".join(details.split()))
        return f"no service can be reached at {endpoint}: {why}"
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return f"no answer from {endpoint} in time: it is busy, or packets to it are dropped on the way (--timeout-s)"
    if code is grpc.StatusCode.UNAUTHENTICATED:
        return f"{endpoint} refuses to answer: {details} (--token-file)"
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return f"what listens at {endpoint} is no nowcaster service"
    return f"no answer from {endpoint}: {' '.join(details.split())}"


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
