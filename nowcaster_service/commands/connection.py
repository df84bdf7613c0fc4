"""Calls of a command to a running service. The home of grpc among the commands."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sidecast.errors import SidecastError
from sidecast.nowcaster_service.config import read_file, read_token
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


@contextmanager
def connected(endpoint: str, args: argparse.Namespace, run_secret: str = "") -> Iterator[Connection]:
    """A service to call within the block.

    Args:
        endpoint: HOST:PORT.
        args: With the options that ``add_options`` has added.
        run_secret: Of the run that calls are about; empty for none.

    Raises:
        SidecastError: It does not answer, or refuses a call.
        ConfigError: A file that an option names cannot be read.
    """
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
        credentials = grpc.ssl_channel_credentials(read_file("--tls-ca", args.tls_ca))
        channel = grpc.secure_channel(endpoint, credentials, options)
    with channel:
        try:
            yield Connection(nowcast_pb2_grpc.NowcasterStub(channel), tuple(metadata))
        except grpc.RpcError as error:
            raise SidecastError(f"no answer from {endpoint}: {error.code().name}: {error.details()}") from error
