"""Settings of the service: declared, with their defaults and options, and validated here."""

from __future__ import annotations

import ipaddress
import os
import secrets
from dataclasses import dataclass, field
from pathlib import Path

from sidecast.errors import ConfigError
from sidecast.nowcaster_service.options import option

KIB, GIB = 1 << 10, 1 << 30
MIN_CHUNK_BYTES = 64 << 10
MAX_PORT = 65_535
# gRPC's default limit for a received message is 4 MiB; a chunk's key and framing need room below it.
MAX_CHUNK_BYTES = (4 << 20) - (64 << 10)
TOKEN_OPTION, TENANTS_OPTION = "--token-file", "--tenants-file"
PROBE_OPTION, TOKENIZER_OPTION = "--probe", "--probe-tokenizer"
PROBE_TOKEN_SUFFIXES, PROBE_TEXT_SUFFIX = (".npy", ".safetensors"), ".txt"


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


def is_probe_file(probe: str) -> bool:
    """Whether a probe is named by a file, by what its name ends with; otherwise by a function."""
    return probe.endswith((*PROBE_TOKEN_SUFFIXES, PROBE_TEXT_SUFFIX))


def _absolute_probe(probe: str) -> str:
    return str(Path(probe).absolute()) if is_probe_file(probe) else probe


@dataclass(frozen=True, kw_only=True)
class TlsFiles:
    """PEM files for TLS."""

    certificate: Path = field(metadata=option("--tls-cert", "PEM certificate; needed off loopback", kind=Path))
    private_key: Path = field(metadata=option("--tls-key", "PEM private key; needed off loopback", kind=Path))
    client_authority: Path | None = field(
        default=None,
        metadata=option(
            "--tls-client-ca", "PEM certificate of the authority that must have signed every client's", kind=Path
        ),
    )


@dataclass(frozen=True, kw_only=True)
class ServiceConfig:
    """Everything that ``sidecast serve`` needs to know: each setting with its default, its option and what it means."""

    host: str = field(default="127.0.0.1", metadata=option("--host", "address to bind"))
    # Never 0 here, so that a restarted ingress comes back where clients look for it.
    port: int = field(default=50051, metadata=option("--port", "gRPC port; 0 picks a free one", kind=int))
    metrics_port: int | None = field(
        default=None,
        metadata=option("--metrics-port", "serve Prometheus metrics on this port", kind=int, default="none"),
    )
    page_port: int | None = field(
        default=None,
        metadata=option("--page-port", "serve the live page on this port", kind=int, default="none"),
    )
    page_control: bool = field(
        default=False,
        metadata=option(
            "--page-control",
            "whoever may see a run as its own on the page may pause and resume it there, and by `sidecast pause`, "
            "without the run's secret",
            is_flag=True,
        ),
    )
    weights: Path | None = field(
        default=None,
        metadata=option(
            "--weights",
            "weights file for the predictors that need one (nino, wnn_plus)",
            kind=Path,
            # Engines may run in another folder.
            read=Path.resolve,
        ),
    )
    history_dir: Path = field(
        metadata=option(
            "--history-dir",
            "folder of this service alone, for histories, which outlive the service there",
            kind=Path,
            default="a temporary one",
        )
    )
    history_budget_bytes: int = field(
        default=16 * GIB,
        metadata=option("--history-gib", "history budget of all runs together, in GiB", kind=float, unit=GIB),
    )
    run_budget_bytes: int | None = field(
        default=None,
        metadata=option(
            "--history-gib-per-run",
            "most history that one run may ask for, in GiB",
            kind=float,
            unit=GIB,
            default="all of it",
        ),
    )
    max_sessions: int = field(
        default=1000, metadata=option("--max-sessions", "runs that may be open at once", kind=int)
    )
    chunk_bytes: int = field(
        default=1024 * KIB,
        metadata=option("--chunk-kib", "message size in KiB, both ways", kind=int, unit=KIB),
    )
    num_engines: int = field(
        default=1,
        metadata=option("--engines", "processes that share each nowcast", kind=int),
    )
    engine_threads: int = field(default=1, metadata=option("--engine-threads", "CPU threads per engine", kind=int))
    device: str | None = field(
        default=None,
        metadata=option(
            "--device",
            "where predictors compute that can choose: cpu or cuda, unless a run's own options say otherwise",
        ),
    )
    engine_gpus: float = field(
        default=0.0,
        metadata=option("--engine-gpus", "GPUs per engine", kind=float, default="1 with --device cuda, 0 without"),
    )
    probe: str | None = field(
        default=None,
        metadata=option(
            PROBE_OPTION,
            "evaluate the read-outs of all runs on this: token ids (.npy, .safetensors), a text (.txt), or "
            "MODULE:FUNCTION, which is run here",
            # Another process, in another folder, reads it.
            read=_absolute_probe,
            default="none",
        ),
    )
    probe_tokenizer: Path | None = field(
        default=None,
        metadata=option(
            TOKENIZER_OPTION, "folder with the tokenizer.json of a probe's text", kind=Path, read=Path.absolute
        ),
    )
    probe_gpus: float = field(
        default=0.0,
        metadata=option("--probe-gpus", "GPUs for the probe's process; without one it computes on the CPU", kind=float),
    )
    nowcast_timeout_s: float = field(
        default=300.0,
        metadata=option("--nowcast-timeout-s", "a nowcast that takes longer is given up", kind=float),
    )
    engines_timeout_s: float = field(
        default=120.0,
        metadata=option(
            "--engines-timeout-s",
            "a service whose engines, or whose own process, cannot be reached for so long ends, unless it is on a "
            "Ray cluster that was there before",
            kind=float,
        ),
    )
    session_timeout_s: float = field(
        default=3600.0,
        metadata=option(
            "--session-timeout-s", "runs that nobody uses or watches for so long are forgotten", kind=float
        ),
    )
    token_file: Path | None = field(
        default=None,
        metadata=option(
            TOKEN_OPTION,
            f"file holding the shared secret that clients must send; this or {TENANTS_OPTION} is needed off loopback",
            kind=Path,
            # The ingress may run in another folder. Links stay: a mounted secret is one, and leads elsewhere once it
            # has changed.
            read=Path.absolute,
        ),
    )
    tenants_file: Path | None = field(
        default=None,
        metadata=option(
            TENANTS_OPTION,
            "file of tenants, who see none but their own runs: lines of a name and the SHA-256 digest of a token",
            kind=Path,
            read=Path.absolute,
        ),
    )
    tls: TlsFiles | None = None

    def __post_init__(self) -> None:
        if self.token_file is not None and self.tenants_file is not None:
            raise ConfigError(f"{TOKEN_OPTION} and {TENANTS_OPTION} are both given; allowed: one of them")
        has_tokens = self.token_file is not None or self.tenants_file is not None
        if not is_loopback(self.host) and (self.tls is None or not has_tokens):
            raise ConfigError(
                f"--host {self.host} is reachable from other machines: --tls-cert, --tls-key and {TOKEN_OPTION} or "
                f"{TENANTS_OPTION} are required (only loopback addresses may do without)"
            )
        for name, port in (
            ("--port", self.port),
            ("--metrics-port", self.metrics_port),
            ("--page-port", self.page_port),
        ):
            if port is not None and not 0 < port <= MAX_PORT:
                raise ConfigError(f"{name} is {port}; allowed: 1 to {MAX_PORT}")
        if not MIN_CHUNK_BYTES <= self.chunk_bytes <= MAX_CHUNK_BYTES:
            raise ConfigError(
                f"chunk size is {self.chunk_bytes} bytes; allowed: {MIN_CHUNK_BYTES} to {MAX_CHUNK_BYTES}"
            )
        if self.history_budget_bytes <= 0:
            raise ConfigError(f"the history budget is {self.history_budget_bytes} bytes; it must be positive")
        if self.run_budget_bytes is not None and not 0 < self.run_budget_bytes <= self.history_budget_bytes:
            raise ConfigError(
                f"the history budget of one run is {self.run_budget_bytes} bytes; allowed: 1 to that of all runs "
                f"({self.history_budget_bytes})"
            )
        if self.max_sessions < 1:
            raise ConfigError(f"--max-sessions is {self.max_sessions}; it must be at least 1")
        if self.num_engines < 1:
            raise ConfigError(f"--engines is {self.num_engines}; it must be at least 1")
        if self.engine_threads < 1:
            raise ConfigError(f"--engine-threads is {self.engine_threads}; it must be at least 1")
        if not self.engine_gpus >= 0:
            raise ConfigError(f"--engine-gpus is {self.engine_gpus:g}; it must be 0 or more")
        if not self.probe_gpus >= 0:
            raise ConfigError(f"--probe-gpus is {self.probe_gpus:g}; it must be 0 or more")
        if self.probe is None and (self.probe_tokenizer is not None or self.probe_gpus):
            raise ConfigError(f"{TOKENIZER_OPTION} and --probe-gpus go with {PROBE_OPTION}, which is missing")
        if self.device is not None:
            # It brings PyTorch, which `sidecast status` and answers to wrong arguments need not wait for.
            from sidecast.predictors.device import check_device

            check_device("--device", self.device)
        if not 0 < self.nowcast_timeout_s < self.session_timeout_s:
            raise ConfigError(
                f"timeouts must rise: nowcast ({self.nowcast_timeout_s:g} s) < session ({self.session_timeout_s:g} s)"
            )
        if not self.engines_timeout_s > 0:
            raise ConfigError(f"--engines-timeout-s is {self.engines_timeout_s:g}; it must be above 0")
        if self.weights is not None and not self.weights.is_file():
            raise ConfigError(f"--weights {self.weights} is not a file")
        if self.tls is not None:
            for option, path in (
                ("--tls-cert", self.tls.certificate),
                ("--tls-key", self.tls.private_key),
                ("--tls-client-ca", self.tls.client_authority),
            ):
                if path is not None:
                    read_file(option, path)


def default_engine_gpus(device: str | None) -> float:
    """GPUs of one engine that computes on a device."""
    return float(device is not None and device.startswith("cuda"))


def require_ray_token() -> None:
    """Makes a local Ray demand a token; call it before ray is imported, which reads the environment only then.

    Ray binds wildcard addresses whatever it is told: without a token anyone on the network could run code here.
    """
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def host_and_port(host: str, port: int) -> str:
    """An address as clients write it: those of version 6 of the protocol have colons of their own."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
