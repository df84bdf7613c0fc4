"""``sidecast serve``: run the nowcaster service until it is told to stop."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import signal
import socket
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

import psutil

from sidecast.atomic_files import replacing
from sidecast.errors import ConfigError, SidecastError
from sidecast.nowcaster_service.config import ServiceConfig, TlsFiles, default_engine_gpus, require_ray_token
from sidecast.nowcaster_service.errors import AddressError
from sidecast.nowcaster_service.options import Option, add_options, given_settings, options_of
from sidecast.nowcaster_service.vector_store import FolderLock

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
REAP_TIMEOUT_S = 5.0
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
            history_dir = Path(
                stack.enter_context(tempfile.TemporaryDirectory(prefix="sidecast-history-", ignore_cleanup_errors=True))
            )
        config = service_config(args, history_dir / "vectors")
        _check_ports(config)
        # Another running service's folder is told of before Ray takes seconds to start; the ingress keeps the lock.
        FolderLock(config.history_dir).release()
        return _supervise(lambda: _serve(config, args.ray_address, args.port_file), stack.close)


def _serve(config: ServiceConfig, ray_address: str | None, port_file: Path | None) -> int:
    if ray_address is None:
        require_ray_token()
    # Importing Ray takes seconds; wrong arguments are answered before.
    from sidecast.nowcaster_service.app import Application

    application = Application(config, ray_address)
    try:
        # Only now: Ray installs handlers of its own when it starts.
        stop = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        address = application.address()
        sys.stdout.write(f"sidecast serves at {address}\n")
        sys.stdout.flush()
        if port_file is not None:
            # Readers poll for the file: it must never be there half-written.
            with replacing(port_file) as partial:
                partial.write_text(address)
        stop.wait()
    finally:
        application.stop()
    return 0


def _supervise(work: Callable[[], int], clean_up: Callable[[], None]) -> int:
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
            if os.getppid() == supervisor:
                status = work()
        except SidecastError as error:
            sys.stderr.write(f"sidecast: {error}\n")
            status = 2
        except BaseException:
            traceback.print_exc()
        finally:
            _reap_children()
            clean_up()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os.kill(child, signal.SIGTERM))
    try:
        _, wait_status = os.waitpid(child, 0)
    finally:
        _reap_children()
    return abs(os.waitstatus_to_exitcode(wait_status))


def service_config(args: argparse.Namespace, history_dir: Path) -> ServiceConfig:
    """Turns parsed arguments into checked settings."""
    if (args.tls_cert is None) != (args.tls_key is None):
        raise ConfigError("--tls-cert and --tls-key go together; one of them is missing")
    settings = given_settings(ServiceConfig, args) | {"history_dir": history_dir}
    if args.port == 0:
        settings["port"] = _free_port(settings.get("host", ServiceConfig.host))
    if args.engine_gpus is None:
        settings["engine_gpus"] = default_engine_gpus(args.device)
    if args.tls_cert is not None:
        settings["tls"] = TlsFiles(**given_settings(TlsFiles, args))
    return ServiceConfig(**settings)


def _check_ports(config: ServiceConfig) -> None:
    """Finds out in a moment what would otherwise come to light once Ray has started."""
    for option, port in (("--port", config.port), ("--metrics-port", config.metrics_port)):
        if port is not None:
            try:
                socket.create_server((config.host, port)).close()
            except OSError as error:
                # Python's own text for this error says the address twice.
                reason = os.strerror(error.errno) if error.errno else str(error)
                raise AddressError(f"{option} {port} cannot be used on {config.host}: {reason}") from error


def _free_port(host: str) -> int:
    with socket.create_server((host, 0)) as probe:
        return int(probe.getsockname()[1])


def _reap_children() -> None:
    """Ends every process that is still below this one."""
    children = psutil.Process().children(recursive=True)
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    psutil.wait_procs(children, timeout=REAP_TIMEOUT_S)
