"""Calls of a command to a running service. The home of grpc among the commands."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sidecast.errors import ConfigError, SidecastError
from sidecast.nowcaster_service.config import MAX_PORT, read_file, read_token
from sidecast.protos.transport import AUTHORIZATION_KEY, BULK_OPTIONS, RUN_SECRET_KEY


@dataclass(frozen=True)
class Connection:
    """A service, and what every call to it shows.

    Attributes:
        stub: Makes the calls.
        metadata: Of every call.
    """

    stub: Any
    metadata: tuple[tuple[str, str], ...]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Lets a parser take what a service off loopback needs."""
    parser.add_argument("--token-file", type=Path, help="file holding the shared secret")
    parser.add_argument("--tls-ca", type=Path, help="PEM certificate of the authority that signed the service's")
    parser.add_argument("--tls-cert", type=Path, help="PEM certificate to show, where the service asks for one")
    parser.add_argument("--tls-key", type=Path, help="its PEM private key")


@contextmanager
def connected(endpoint: str, args: argparse.Namespace, run_secret: str = "") -> Iterator[Connection]:
    """A service to call within the block.

    Args:
        endpoint: HOST:PORT.
        args: With the options that ``add_options`` has added.
        run_secret: Of the run that calls are about; empty for none.

    Raises:
        SidecastError: It does not answer, or refuses a call.
        ConfigError: A file that an option names cannot be read, the endpoint is none, or an option lacks another.
    """
    host, _, port = endpoint.rpartition(":")
    if not host or not (port.isascii() and port.isdecimal() and 0 < int(port) <= MAX_PORT):
        raise ConfigError(f"endpoint is {endpoint!r}; allowed: HOST:PORT")
    if (args.tls_cert is None) != (args.tls_key is None) or (args.tls_cert is not None and args.tls_ca is None):
        raise ConfigError("--tls-cert and --tls-key go together, and with --tls-ca; one of them is missing")
    # What fails is said here, once; gRPC would log it besides.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    import grpc

    from sidecast.protos import nowcast_pb2_grpc

    # Hosts often have proxies for the web, which cannot carry this. And a list of many sessions is long.
    options = [*BULK_OPTIONS, ("grpc.enable_http_proxy", 0), ("grpc.max_receive_message_length", -1)]
    metadata = []
    if args.token_file is not None:
        metadata.append((AUTHORIZATION_KEY, f"Bearer {read_token('--token-file', args.token_file)}"))
    if run_secret:
        metadata.append((RUN_SECRET_KEY, run_secret))
    if args.tls_ca is None:
        channel = grpc.insecure_channel(endpoint, options)
    else:
        authority, key, certificate = (
            None if path is None else read_file(option, path)
            for option, path in (("--tls-ca", args.tls_ca), ("--tls-key", args.tls_key), ("--tls-cert", args.tls_cert))
        )
        credentials = grpc.ssl_channel_credentials(authority, key, certificate)
        channel = grpc.secure_channel(endpoint, credentials, options)
    with channel:
        try:
            yield Connection(nowcast_pb2_grpc.NowcasterStub(channel), tuple(metadata))
        except grpc.RpcError as error:
            raise SidecastError(_explained(endpoint, error.code(), error.details() or "")) from error


def _explained(endpoint: str, code: object, details: str) -> str:
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
        return f"what listens at {endpoint} is no nowcaster service, or too old a one"
    return f"{endpoint} refuses: {' '.join(details.split())}"
