"""``sidecast serve``: run the nowcaster service until it is told to stop."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import psutil

from sidecast.atomic_files import replacing
from sidecast.errors import ConfigError, SidecastError
from sidecast.nowcaster_service.access.callers import callers_of
from sidecast.nowcaster_service.commands.temporary_folders import make_temporary, remove_left
from sidecast.nowcaster_service.config import MAX_PORT, ServiceConfig, TlsFiles, default_engine_gpus, require_ray_token
from sidecast.nowcaster_service.errors import AddressError
from sidecast.nowcaster_service.options import Option, add_options, given_settings, options_of
from sidecast.nowcaster_service.probing.source import read_source
from sidecast.nowcaster_service.vector_store import FolderLock

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
REAP_TIMEOUT_S = 5.0
# Where the system takes ports from for those who do not care, unless its settings say otherwise.
EPHEMERAL_PORT_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_EPHEMERAL_PORTS = (32_768, 60_999)
MIN_PORT = 10_000
HISTORY_PREFIX, RAY_PREFIX = "sidecast-history-", "sidecast-ray-"
# Sockets lie there, whose paths the system limits to 107 bytes: no folder of the user's choice, which may be long.
RAY_PARENT = Path("/tmp")
MIN_LEFT_S, MIN_LEFT_LOGS_S = 60.0, 86_400.0
VECTORS = "vectors"
NUM_PORT_TRIES = 100
OPTIONS = (
    *options_of(ServiceConfig).values(),
    *options_of(TlsFiles).values(),
    # Of the command rather than of the service.
    Option(flag="--port-file", help="write the bound HOST:PORT here once the service is ready", kind=Path),
    Option(flag="--ray-address", help="join this Ray cluster instead of starting a local Ray"),
)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "serve",
        help="run the nowcaster service",
        description="Runs the nowcaster service: keeps parameter histories, makes nowcasts, sends them back. "
        "Training jobs find it under the address in their ds_config's nowcaster.endpoint. Ends on Ctrl-C or SIGTERM.",
    )
    add_options(parser, OPTIONS)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    with contextlib.ExitStack() as stack:
        history_dir = args.history_dir
        if history_dir is None:
            parent = Path(tempfile.gettempdir())
            remove_left(HISTORY_PREFIX, parent, MIN_LEFT_S, locked=(VECTORS,))
            history_dir = make_temporary(HISTORY_PREFIX, parent)
            stack.callback(shutil.rmtree, history_dir, ignore_errors=True)
        config = service_config(args, history_dir / VECTORS)
        _check_ports(config)
        # Another running service's folder is told of before Ray takes seconds to start; the ingress keeps the lock.
        FolderLock(config.history_dir).release()
        ray_dir = None
        if args.ray_address is None:
            remove_left(RAY_PREFIX, RAY_PARENT, MIN_LEFT_LOGS_S)
            ray_dir = make_temporary(RAY_PREFIX, RAY_PARENT)

        def clean_up(status: int) -> None:
            stack.close()
            if ray_dir is not None and status == 0:
                shutil.rmtree(ray_dir, ignore_errors=True)

        status = _supervise(lambda: _serve(config, args.ray_address, ray_dir, args.port_file), clean_up)
        if ray_dir is not None and status != 0:
            sys.stderr.write(f"sidecast: Ray's logs are in {ray_dir} for a day\n")
        return status


def _serve(config: ServiceConfig, ray_address: str | None, ray_dir: Path | None, port_file: Path | None) -> int:
    if ray_address is None:
        require_ray_token()
    # Importing Ray takes seconds; wrong arguments are answered before.
    from sidecast.nowcaster_service.app import Application

    application = Application(config, ray_address, ray_dir)
    try:
        # Only now: Ray installs handlers of its own when it starts.
        stop = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        address = application.address(stop)
        if address is None:
            return 0
        sys.stdout.write(f"sidecast serves at {address}\n")
        sys.stdout.flush()
        if port_file is not None:
            # Readers poll for the file: it must never be there half-written.
            with replacing(port_file) as partial:
                partial.write_text(address)
        application.watch(stop)
    finally:
        application.stop()
    return 0


def _supervise(work: Callable[[], int], clean_up: Callable[[int], None]) -> int:
    """Runs the service in a child process; whichever of the two dies, the other clears away what is left.

    Ray's agents outlive their parents by minutes or for ever when those are killed. Both processes are
    subreapers, so that orphans below come to them, and each ends everything below it before it ends.
    """
    prctl = ctypes.CDLL(None).prctl
    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    supervisor = os.getpid()
    child = os.fork()
    if child == 0:
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        status = 1
        try:
            # Until there is something to stop in order; Ray's own handlers do the same.
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, _exit)
            if os.getppid() == supervisor:
                status = work()
        except (SystemExit, KeyboardInterrupt):
            status = 0
        except SidecastError as error:
            sys.stderr.write(f"sidecast: {error}\n")
            status = 2
        except BaseException:
            traceback.print_exc()
        finally:
            _reap_children()
            clean_up(status)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os.kill(child, signal.SIGTERM))
    try:
        _, wait_status = os.waitpid(child, 0)
    finally:
        _reap_children()
    status = abs(os.waitstatus_to_exitcode(wait_status))
    clean_up(status)
    return status


def _exit(*_: object) -> NoReturn:
    raise SystemExit(0)


def service_config(args: argparse.Namespace, history_dir: Path) -> ServiceConfig:
    """Turns parsed arguments into checked settings."""
    if (args.tls_cert is None) != (args.tls_key is None):
        raise ConfigError("--tls-cert and --tls-key go together; one of them is missing")
    if args.tls_client_ca is not None and args.tls_cert is None:
        raise ConfigError("--tls-client-ca needs --tls-cert and --tls-key")
    settings = given_settings(ServiceConfig, args) | {"history_dir": history_dir}
    if args.port == 0:
        settings["port"] = _free_port(settings.get("host", ServiceConfig.host))
    if args.engine_gpus is None:
        settings["engine_gpus"] = default_engine_gpus(args.device)
    if args.tls_cert is not None:
        settings["tls"] = TlsFiles(**given_settings(TlsFiles, args))
    config = ServiceConfig(**settings)
    # What is wrong with a file is said before Ray takes seconds to start.
    callers_of(config)
    if config.probe is not None:
        read_source(config.probe, config.probe_tokenizer)
    return config


def _check_ports(config: ServiceConfig) -> None:
    """Finds out in a moment what would otherwise come to light once Ray has started."""
    for option, port in (
        ("--port", config.port),
        ("--metrics-port", config.metrics_port),
        ("--page-port", config.page_port),
    ):
        if port is not None:
            try:
                _listener(config.host, port).close()
            except OSError as error:
                # Python's own text for this error says the address twice.
                reason = os.strerror(error.errno) if error.errno else str(error)
                raise AddressError(f"{option} {port} cannot be used on {config.host}: {reason}") from error


def _free_port(host: str) -> int:
    """A port that nobody listens on, and that the system gives to nobody: Ray opens dozens before ours is bound."""
    first, last = _EPHEMERAL_PORTS
    with contextlib.suppress(OSError, ValueError):
        first, last = map(int, EPHEMERAL_PORT_RANGE.read_text().split())
    outside = [*range(MIN_PORT, first), *range(last + 1, MAX_PORT + 1)]
    for port in random.SystemRandom().sample(outside, min(NUM_PORT_TRIES, len(outside))):
        with contextlib.suppress(OSError), _listener(host, port):
            return port
    with _listener(host, 0) as probe:
        return int(probe.getsockname()[1])


def _listener(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family)


def _reap_children() -> None:
    """Ends every process that is still below this one."""
    children = psutil.Process().children(recursive=True)
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    psutil.wait_procs(children, timeout=REAP_TIMEOUT_S)
