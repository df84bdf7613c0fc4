"""Settings of the service: parsed from argv in one place, validated here."""

from __future__ import annotations

import ipaddress
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from sidecast.errors import ConfigError
from sidecast.predictors.device import check_device

MIN_CHUNK_BYTES = 64 << 10
MAX_PORT = 65_535
# gRPC's default limit for a received message is 4 MiB; a chunk's key and framing need room below it.
MAX_CHUNK_BYTES = (4 << 20) - (64 << 10)


@dataclass(frozen=True, kw_only=True)
class TlsFiles:
    """PEM files for TLS."""

    certificate: Path
    private_key: Path


@dataclass(frozen=True, kw_only=True)
class ServiceConfig:
    """Everything that ``sidecast serve`` needs to know.

    Attributes:
        host: Address to bind.
        port: gRPC port; never 0 here, so that a restarted ingress comes back where clients look for it.
        metrics_port: Port of the Prometheus endpoint; None for none.
        weights: Predictor weights; None for predictors without.
        history_dir: Folder of the memory-mapped history.
        history_budget_bytes: Most bytes that all sessions' vectors may take together.
        chunk_bytes: Size of the chunks that clients send and receive.
        num_engines: Processes that share each nowcast.
        engine_threads: CPU threads of one engine.
        engine_gpus: GPUs of one engine.
        device: Where predictors that can choose compute, unless a run says otherwise; None leaves it to them.
        nowcast_timeout_s: A nowcast that takes longer is given up.
        session_timeout_s: A session without any message for so long is closed.
        token: Shared secret that every call must carry; None for none.
        tls: Certificate and key; None for plain text.
    """

    host: str
    port: int
    metrics_port: int | None
    weights: Path | None
    history_dir: Path
    history_budget_bytes: int
    chunk_bytes: int
    num_engines: int
    engine_threads: int
    engine_gpus: float
    device: str | None
    nowcast_timeout_s: float
    session_timeout_s: float
    token: str | None
    tls: TlsFiles | None

    def __post_init__(self) -> None:
        if not is_loopback(self.host) and (self.tls is None or self.token is None):
            raise ConfigError(
                f"--host {self.host} is reachable from other machines: --tls-cert, --tls-key and --token-file "
                "are required (only loopback addresses may do without)"
            )
        for name, port in (("--port", self.port), ("--metrics-port", self.metrics_port)):
            if port is not None and not 0 < port <= MAX_PORT:
                raise ConfigError(f"{name} is {port}; allowed: 1 to {MAX_PORT}")
        if self.token == "":
            raise ConfigError("--token-file holds an empty token; it must hold the shared secret")
        if not MIN_CHUNK_BYTES <= self.chunk_bytes <= MAX_CHUNK_BYTES:
            raise ConfigError(
                f"chunk size is {self.chunk_bytes} bytes; allowed: {MIN_CHUNK_BYTES} to {MAX_CHUNK_BYTES}"
            )
        if self.history_budget_bytes <= 0:
            raise ConfigError(f"the history budget is {self.history_budget_bytes} bytes; it must be positive")
        if self.num_engines < 1:
            raise ConfigError(f"--engines is {self.num_engines}; it must be at least 1")
        if self.engine_threads < 1:
            raise ConfigError(f"--engine-threads is {self.engine_threads}; it must be at least 1")
        if not self.engine_gpus >= 0:
            raise ConfigError(f"--engine-gpus is {self.engine_gpus:g}; it must be 0 or more")
        if self.device is not None:
            check_device("--device", self.device)
        if not 0 < self.nowcast_timeout_s < self.session_timeout_s:
            raise ConfigError(
                f"timeouts must rise: nowcast ({self.nowcast_timeout_s:g} s) < session ({self.session_timeout_s:g} s)"
            )
        if self.weights is not None and not self.weights.is_file():
            raise ConfigError(f"--weights {self.weights} is not a file")
        if self.tls is not None:
            for option, path in (("--tls-cert", self.tls.certificate), ("--tls-key", self.tls.private_key)):
                read_file(option, path)


def read_file(option: str, path: Path) -> bytes:
    """Reads a file that the user named.

    Raises:
        ConfigError: It cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{option} {path} cannot be read: {error.strerror}") from error


def read_token(option: str, path: Path) -> str:
    """Reads the shared secret.

    Raises:
        ConfigError: The file cannot be read, or holds none: an empty secret would let everybody in.
    """
    token = read_file(option, path).decode("ascii", errors="replace").strip()
    if not token or not token.isascii() or not token.isprintable():
        raise ConfigError(f"{option} {path} holds no token; allowed: one line of printable ASCII characters")
    return token


def require_ray_token() -> None:
    """Makes a local Ray demand a token; call it before ray is imported, which reads the environment only then.

    Ray binds wildcard addresses whatever it is told: without a token anyone on the network could run code here.
    """
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
