"""The metrics' own port: open as Prometheus has it, or, where there are tenants, for those who show a token."""

from __future__ import annotations

import socket
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any
from wsgiref.types import StartResponse

from prometheus_client import CollectorRegistry, Metric, make_wsgi_app, start_http_server

from sidecast.nowcaster_service.access.callers import Caller, Callers
from sidecast.nowcaster_service.access.encryption import server_context
from sidecast.nowcaster_service.config import ServiceConfig, TlsFiles
from sidecast.nowcaster_service.errors import AddressError
from sidecast.nowcaster_service.metrics import RUN_LABEL


def serve_metrics(
    config: ServiceConfig,
    registry: CollectorRegistry,
    callers: Callers,
    visible_runs: Callable[[Caller], Collection[str]],
    port: int,
) -> int:
    """Serves the metrics in threads of their own.

    Where there are tenants, a scrape shows a token as calls do, gets the series of that tenant's runs and those that
    are about no run, and is encrypted if calls are.

    Args:
        config: Settings.
        registry: All series.
        callers: Whose scrapes are answered, where there are tenants.
        visible_runs: The runs that a caller may know of; called in any thread.
        port: Where to listen; 0 picks a free port.

    Returns:
        The port.

    Raises:
        AddressError: The port is in use, or the address is not this host's.
    """
    has_tenants = config.tenants_file is not None
    try:
        # With tenants nothing is to be seen before it is known who looks.
        server, _ = start_http_server(port, addr=config.host, registry=CollectorRegistry() if has_tenants else registry)
    except OSError as error:
        raise AddressError(
            f"cannot serve metrics at {config.host}:{port}: {error.strerror} (--metrics-port)"
        ) from error
    if has_tenants:
        if config.tls is not None:
            server.socket = _encrypted(server.socket, config.tls)
        server.set_app(_app_for_tenants(registry, callers, visible_runs))
    return server.server_port


def _encrypted(listener: socket.socket, files: TlsFiles) -> socket.socket:
    """A listener whose handshakes are made by whoever answers: one that never ends holds up nobody else."""
    return server_context(files).wrap_socket(listener, server_side=True, do_handshake_on_connect=False)


def _app_for_tenants(
    registry: CollectorRegistry, callers: Callers, visible_runs: Callable[[Caller], Collection[str]]
) -> Callable[[dict[str, Any], StartResponse], Iterable[bytes]]:
    def answer(environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        caller = callers.caller(environ.get("HTTP_AUTHORIZATION", ""))
        if caller is None:
            start_response("401 Unauthorized", [("WWW-Authenticate", "Bearer"), ("Content-Type", "text/plain")])
            return [b"a tenant's token is needed\n"]
        # A choice of names goes by the registry's own index, past what is left out here.
        environ["QUERY_STRING"] = ""
        return make_wsgi_app(_Visible(registry, visible_runs(caller)))(environ, start_response)

    return answer


class _Visible:
    """Of a registry what is about some runs, or about none."""

    def __init__(self, registry: CollectorRegistry, runs: Collection[str]) -> None:
        self._registry = registry
        self._runs = runs

    def collect(self) -> Iterator[Metric]:
        for metric in self._registry.collect():
            shown = Metric(metric.name, metric.documentation, metric.type, metric.unit)
            shown.samples = [
                sample
                for sample in metric.samples
                if RUN_LABEL not in sample.labels or sample.labels[RUN_LABEL] in self._runs
            ]
            yield shown
